"""zoo store."""

from __future__ import annotations

import json

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


def test_store_errors_are_one_sentence(zoo, tiny, tmp_path):
    for args, said in (
        (("add", tmp_path / "s", tmp_path), "there is no config.yaml"),
        (("get", tmp_path / "s", "x", "--out", tmp_path / "o"), "there is no model 'x' in this store"),
        (("compare", "a"), "compare takes two models"),
        (("assemble", tmp_path / "s", tiny, "--take", "x", "--out", tmp_path / "o"), "is not NODE=MODEL"),
    ):
        err = zoo("store", *args, code=2).err
        assert said in err and len(err.splitlines()) == 1, err
