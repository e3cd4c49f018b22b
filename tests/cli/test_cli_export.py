"""zoo export: what it writes and what it refuses."""

from __future__ import annotations

import json
import shutil


def test_export_of_a_run(zoo, trained, tmp_path):
    out = tmp_path / "out"
    document = json.loads(zoo("export", trained, "--out", out, "--json").out)
    assert document["format"] == "hf" and sorted(p.name for p in out.iterdir()) == document["files"]
    assert {"config.json", "generation_config.json", "model.safetensors", "modeling_zoo.py", "README.md",
            "tokenizer.json", "tokenizer_config.json", "graph.svg", "config.yaml"} == {*document["files"]}  # fmt: skip
    assert document["bytes"] == sum(p.stat().st_size for p in out.iterdir())
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 256
    assert "is not an empty folder" in zoo("export", trained, "--out", out, code=2).err


def test_export_of_a_saved_model_says_how_to_load_it(zoo, trained, tmp_path):
    shutil.copytree(trained / "model", tmp_path / "saved")
    said = zoo("export", tmp_path / "saved", "--format", "hf", "--out", tmp_path / "out").out
    assert "trust_remote_code=True" in said and "modeling_zoo.py" in said


def test_bad_requests(zoo, trained, tmp_path):
    out = tmp_path / "out"
    assert (
        "unknown format 'hff'; did you mean hf?" in zoo("export", trained, "--format", "hff", "--out", out, code=2).err
    )
    assert "there is no config.yaml" in zoo("export", tmp_path / "nowhere", "--out", out, code=2).err
    shutil.copytree(trained / "model", tmp_path / "torn")
    (tmp_path / "torn" / "model.safetensors").unlink()
    said = zoo("export", tmp_path / "torn", "--out", out, code=2).err
    assert "there is no model.safetensors" in said and len(said.splitlines()) == 1
    assert not out.exists()
