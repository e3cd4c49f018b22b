"""zoo store."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch

import zoo as package


def test_store_from_run_to_assembled_model(zoo, trained, tiny, tmp_path):
    store = tmp_path / "blocks"
    assert "0 of them shared" in zoo("store", "add", store, trained, "--name", "first").out
    zoo("build", tiny, "--out", tmp_path / "fresh", "--seed", 3)
    made = json.loads(zoo("store", "add", store, tmp_path / "fresh", "--name", "fresh", "--json").out)
    assert made["name"] == "fresh" and made["saved_bytes"] <= made["bytes"]
    told = json.loads(zoo("store", "list", store, "--json").out)
    assert [m["name"] for m in told["models"]] == ["first", "fresh"]
    assert "objects" in zoo("store", "list", store).out

    zoo("store", "get", store, "first", "--out", tmp_path / "back")
    weights = "model.safetensors"
    assert (tmp_path / "back" / weights).read_bytes() == (trained / "model" / weights).read_bytes()
    assert json.loads(zoo("store", "compare", trained, tmp_path / "back", "--json").out)["equal"]
    found = json.loads(zoo("store", "compare", store, "first", "fresh", "--json").out)
    assert not found["equal"] and {n["how"] for n in found["nodes"]} >= {"weights"}
    assert "stream behind" in zoo("store", "compare", store, "first", tmp_path / "fresh").out

    out = tmp_path / "mixed"
    takes = ["--take", "all=first", "--take", "layers.0=fresh"]
    told = json.loads(zoo("store", "assemble", store, tiny, *takes, "--out", out, "--json").out)
    mixed, fresh = package.from_pretrained(out), package.from_pretrained(tmp_path / "fresh")
    assert all((a == b).all() for a, b in zip(mixed.layers[0].parameters(), fresh.layers[0].parameters()))
    assert told["saved"] == str(out) and told["license"] is None


def test_blocks_of_another_width_are_stitched_in_and_taught(zoo, tmp_path):
    """Assembled with fitted maps, its tokenizer beside it; `zoo distill` goes on from there."""
    layer = [{"attention": {"num_heads": 2}}, "swiglu"]
    store, text, config = tmp_path / "blocks", tmp_path / "fox.txt", tmp_path / "mixed.yaml"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 100)
    for name, dim in (("wide", 32), ("narrow", 16)):
        model = package.build({"dim": dim, "vocab_size": 257, "trunk": [{"repeat": 2, "of": layer}]}, seed=dim)
        folder = model.save_pretrained(tmp_path / name)
        (folder / "LICENSE").write_text("as you like")
        (folder / "generation_config.json").write_text("{}")
        zoo("store", "add", store, folder, "--name", name)
    trunk = [layer, {"stitch": 16, "of": [layer, layer]}]
    config.write_text(json.dumps({"dim": 32, "vocab_size": 257, "trunk": trunk}))
    takes = ["--take", "all=wide"]
    for i in range(2):
        takes += ["--take", f"layers.1.body.items.{i}=narrow:layers.{i}"]
    given = ("--data", text, "--seq", 16, "--rows", 20, "--out", tmp_path / "mixed", "--json")
    told = json.loads(zoo("store", "assemble", store, config, *takes, *given).out)
    assert told["stitches"].keys() == {"layers.1"} and told["loss"].keys() == {"wide", "assembled"}
    assert package.from_pretrained(tmp_path / "mixed").layers[1].in_proj.weight.any()
    assert [(tmp_path / "mixed" / n).exists() for n in ("generation_config.json", "LICENSE")] == [True, False]
    shown = zoo("store", "assemble", store, config, *takes, *given[:-3], "--out", tmp_path / "shown").out
    assert "layers.1: explains" in shown and "held-out loss, assembled" in shown

    taught = ("--steps", 2, "--seq", 16, "--batch", 2, "--data", text, "--out", tmp_path / "taught", "--json")
    told = json.loads(zoo("distill", tmp_path / "wide", tmp_path / "mixed", *taught).out)
    assert told["taught"] == ["layers.1"] and told["loss"]["after"] != told["loss"]["before"]

    plain = ("assemble", store, tmp_path / "wide", "--take", "all=wide", "--rows", 2, "--out", tmp_path / "x")
    assert "go with a stitch that is to be fitted" in zoo("store", *plain, code=2).err
    err = zoo("store", "assemble", store, config, *takes, *given[:-3], "--out", tmp_path / "wide", code=2).err
    assert "is not an empty folder" in err and len(err.splitlines()) == 1


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A model, two that were moved from it at random, and the text that they are merged by."""
    top = tmp_path_factory.mktemp("merge")
    layer = [{"attention": {"num_heads": 2}}, "swiglu"]
    for name in ("base", "one", "two"):
        model = package.build({"dim": 32, "vocab_size": 257, "trunk": [{"repeat": 2, "of": layer}]})
        torch.manual_seed(len(name) + ord(name[0]))
        with torch.no_grad():
            for p in model.layers[1].parameters() if name != "base" else ():
                p.add_(torch.randn_like(p), alpha=0.05)
        model.save_pretrained(top / name)
    (top / "fox.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 60)
    (top / "base" / "LICENSE").write_text("as you like")
    return top


def test_merged_models_follow_the_text(zoo, tuned, tmp_path):
    models, given = (
        [tuned / n for n in ("base", "one", "two")],
        ("--data", tuned / "fox.txt", "--seq", 32, "--batch", 4),
    )
    told = json.loads(zoo("store", "merge", *models, *given, "--steps", 15, "--out", tmp_path / "a", "--json").out)
    assert told["coefficients"].keys() == {"layers.1.items.0", "layers.1.items.1"}
    assert all(len(c) == 2 and any(c) for c in told["coefficients"].values())
    assert told["loss"]["merged"] < told["loss"]["base"] and len(told["loss"]["models"]) == 2
    assert told["steps"] == 15 and not told["interrupted"] and told["license"] is None
    merged, base = package.from_pretrained(tmp_path / "a"), package.from_pretrained(tuned / "base")
    assert torch.equal(merged.layers[0].items[0].block.q_proj.weight, base.layers[0].items[0].block.q_proj.weight)
    shift = [
        package.from_pretrained(m).layers[1].items[1].norm.weight - base.layers[1].items[1].norm.weight
        for m in models[1:]
    ]
    expected = sum(c * t for c, t in zip(told["coefficients"]["layers.1.items.1"], shift))
    found = merged.layers[1].items[1].norm.weight - base.layers[1].items[1].norm.weight
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert (tmp_path / "a" / "LICENSE").is_file()
    shown = zoo("store", "merge", *models, *given, "--steps", 1, "--out", tmp_path / "b").out
    assert "layers.1.items.0" in shown and "held-out loss, merged" in shown and "1 steps, licence not named" in shown


def test_ctrl_c_keeps_the_coefficients(zoo, tuned, tmp_path, monkeypatch):
    from zoo.graft.lesson import Lesson

    whole = Lesson.batches

    def interrupted(self, seed=0):
        for number, rows in enumerate(whole(self, seed)):
            if number == 2:
                os.kill(os.getpid(), signal.SIGINT)
            yield rows

    monkeypatch.setattr(Lesson, "batches", interrupted)
    models = [tuned / n for n in ("base", "one")]
    given = ("--data", tuned / "fox.txt", "--seq", 32, "--batch", 4, "--out", tmp_path / "out", "--json")
    told = json.loads(zoo("store", "merge", *models, *given, code=130).out)
    assert told["interrupted"] and told["steps"] == 2 and (tmp_path / "out" / "model.safetensors").is_file()


def test_merge_errors_are_one_sentence(zoo, tuned, tmp_path):
    base, one = tuned / "base", tuned / "one"
    other = package.build({"dim": 16, "vocab_size": 257, "trunk": ["swiglu"]}).save_pretrained(tmp_path / "other")
    image = package.build("vit_small").save_pretrained(tmp_path / "vit")
    for given, said in (
        ((base, base), "no model differs from the base"),
        ((base, other), "only models of one configuration are merged"),
        ((base, tmp_path), "there is no config.yaml"),
        ((base, one, "--lr", 0), "--lr: must be above 0 and below 1"),
        ((base, one, "--data", "no.txt"), "no.txt: no such file"),
        ((image, image), "merging learns from text"),
    ):
        data = () if "--data" in given else ("--data", tuned / "fox.txt")
        err = zoo("store", "merge", *given, *data, "--out", tmp_path / "out", code=2).err
        assert said in err and len(err.splitlines()) == 1, err


def test_store_errors_are_one_sentence(zoo, tiny, tmp_path):
    for args, said in (
        (("add", tmp_path / "s", tmp_path), "there is no config.yaml"),
        (("get", tmp_path / "s", "x", "--out", tmp_path / "o"), "there is no model 'x' in this store"),
        (("compare", "a"), "compare takes two models"),
        (("assemble", tmp_path / "s", tiny, "--take", "x", "--out", tmp_path / "o"), "is not NODE=MODEL"),
    ):
        err = zoo("store", *args, code=2).err
        assert said in err and len(err.splitlines()) == 1, err
