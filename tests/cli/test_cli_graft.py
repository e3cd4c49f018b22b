"""zoo graft: told, done, taught, refused."""

from __future__ import annotations

import json

import pytest
import torch

import zoo as package

LAYER = [{"attention": {"num_heads": 2}}, "swiglu"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A saved model of two layers of attention that knows bytes."""
    document = {"dim": 32, "vocab_size": 257, "define": {"layer": LAYER}, "trunk": [{"repeat": 2, "of": "layer"}]}
    torch.manual_seed(0)
    return package.build(document).save_pretrained(tmp_path_factory.mktemp("saved"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog\n" * 60)
    return path


def test_without_out_it_only_tells(zoo, model):
    told = zoo("graft", model, "attention", "gla").out
    assert "gla at 2 sites" in told and "nothing is changed; --out DIR grafts and saves" in told
    row = next(line for line in told.splitlines() if " q_proj.weight " in line)
    assert row.split()[:5] == ["layers.*.items.0.block", "q_proj.weight", "kept", "2", "32"]
    assert any(line.split()[:3] == ["kept", "8", "tensors,"] for line in told.splitlines())


def test_the_plan_as_json(zoo, model):
    told = json.loads(zoo("graft", model, "attention", "mamba2", "--json").out)
    assert told["saved"] is None and list(told["sites"]) == ["layers.0.items.0.block", "layers.1.items.0.block"]
    mapped = next(t for t in told["tensors"] if t["tensor"] == "in_proj.weight")
    assert mapped["action"] == "mapped" and "layers.0.items.0.block.q_proj.weight" in mapped["source"]


def test_the_saved_model_is_the_grafted_one(zoo, model, tmp_path):
    out = tmp_path / "grafted"
    given = ("layers.*.items.0.block", "moba", "block_size=4", "top_k=2")
    told = json.loads(zoo("graft", model, *given, "--out", out, "--json").out)
    assert told["saved"] == str(out) and told["block"] == "moba" and "loss" not in told
    assert {(s["block_size"], s["num_heads"]) for s in told["sites"].values()} == {(4, 2)}
    assert {t["action"] for t in told["tensors"]} == {"kept"} and told["totals"]["kept"]["tensors"] == 8
    before, after = package.from_pretrained(model), package.from_pretrained(out)
    params = sum(p.numel() for p in before.parameters())
    assert sum(t["numbers"] for n, t in told["totals"].items() if n != "dropped") == params
    done = package.graft.replace(before, "attention", "moba", block_size=4, top_k=2)
    x = torch.arange(40).view(1, 40)
    assert done.sites == list(told["sites"]) and torch.equal(before(x), after(x))
    assert list(after.config["define"]["layer"][0]) == ["moba"]


def test_options_may_be_mappings(zoo, model, tmp_path):
    select = "select={quest: {block_size: 4, top_k: 2}}"
    zoo("graft", model, "attention", "attention", select, "--out", tmp_path / "out")
    options = package.from_pretrained(tmp_path / "out").config["define"]["layer"][0]["attention"]
    assert options == {"num_heads": 2, "select": {"quest": {"block_size": 4, "top_k": 2}}}


def test_distillation_shows_its_losses_and_saves_what_was_taught(zoo, model, text, tmp_path):
    given = ("--distill", 2, "--seq", 16, "--batch", 2, "--lr", 1e-2, "--data", text, "--out", tmp_path / "taught")
    told = json.loads(zoo("graft", model, "attention", "gla", *given, "--json").out)
    zoo("graft", model, "attention", "gla", "--out", tmp_path / "untaught")
    loss = told["loss"]
    assert list(loss) == ["before", "after_grafting", "after_distillation"] and len(set(loss.values())) == 3
    taught, untaught = (package.from_pretrained(tmp_path / n).state_dict() for n in ("taught", "untaught"))
    moved = {n for n in taught if not torch.equal(taught[n], untaught[n])}
    assert moved and all(".items.0.block." in n for n in moved)


def test_a_folder_of_the_hub_with_its_tokenizer(zoo, text, tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=40,
    )  # fmt: skip
    Qwen2ForCausalLM(config).bfloat16().save_pretrained(tmp_path / "hub")
    words = {"<|endoftext|>": 0} | {chr(97 + i): 1 + i for i in range(26)}
    Tokenizer(models.BPE(words, [], unk_token="a")).save(str(tmp_path / "hub" / "tokenizer.json"))
    given = ("--distill", 2, "--seq", 16, "--batch", 2, "--data", text, "--out", tmp_path / "ours")
    told = zoo("graft", tmp_path / "hub", "attention", "gated_deltanet", *given).out
    assert "gated_deltanet at 2 sites" in told and "held-out loss, after distillation" in told
    assert package.from_pretrained(tmp_path / "ours").lm_head.weight.dtype == torch.bfloat16
    assert (tmp_path / "ours" / "tokenizer.json").is_file()
    (tmp_path / "hub" / "tokenizer.json").unlink()
    given = ("--distill", 2, "--data", text, "--out", tmp_path / "again")
    assert (
        "knows 40 tokens; text as bytes needs 257"
        in zoo("graft", tmp_path / "hub", "attention", "gla", *given, code=2).err
    )


@pytest.mark.parametrize(
    "given, message",
    [
        (("layers.*.item.0.block", "gla"), r"did you mean layers.*.items"),
        (("mamba2", "gla"), "the model has no block mamba2; it has attention, swiglu"),
        (("attention", "gala"), "unknown block 'gala'; did you mean gla"),
        (("attention", "gla", "num_hed=4"), "num_hed: unknown option of gla; did you mean num_heads"),
        (("attention", "gla", "num_heads"), "option 'num_heads': write key=value"),
        (("attention", "gla", "dim=4"), "dim: unknown option of gla"),
        (("attention", "gla", "num_heads=3"), "num_heads"),
        (("attention", "parallel"), "parallel is a combinator"),
        (("layers.1.items.0.block", "gla"), "also means layers.0.items.0.block: replace both"),
        (("layers.*.items.0.norm", "gla"), "layers.0.items.0.norm"),
        (("attention", "gla", "--lr", "0.1"), "--lr goes with --distill"),
        (("attention", "gla", "--distill", "2"), "--distill goes with --out"),
        (("attention", "gla", "--out", "."), ". is not an empty folder"),
        (("attention", "gla", "--distill", "2", "--out", "x", "--lr", "2"), "--lr: must be above 0 and below 1"),
        (("attention", "gla", "--distill", "2", "--out", "x", "--data", "no.txt"), "no.txt: no such file"),
        (("attention", "gla", "--distill", "2", "--out", "x", "--data", "hf:a"), "hf:a: held-out text of a streamed"),
    ],
)
def test_wrong_requests_are_one_sentence(zoo, model, given, message):
    err = zoo("graft", model, *given, code=2).err
    assert message in err and len(err.splitlines()) == 1, err


def test_what_is_no_model(zoo, tmp_path):
    assert "is no saved model, no finished run and no folder" in zoo("graft", tmp_path, "attention", "gla", code=2).err
