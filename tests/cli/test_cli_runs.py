"""zoo train and generate."""

from __future__ import annotations

import json

import pytest

import zoo as package
from zoo.cli.generate import _Text

pytest.importorskip("torchtitan")


def test_train_leaves_a_run_folder(trained):
    names = {p.name for p in trained.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "loss.png", "checkpoint", "model", "evaluation.json", "sample.txt"} <= names
    assert package.from_pretrained(trained).dim == 32


def test_train_json_and_resume(zoo, tiny, tmp_path):
    out = tmp_path / "run"
    first = json.loads(zoo("train", tiny, "--steps", 2, "--out", out, "--json").out)
    assert (first["step"], first["out"], first["interrupted"]) == (2, str(out), False)
    assert first["evaluation"]["bits_per_byte"] > 0
    second = json.loads(zoo("train", out, "--resume", "--steps", 4, "--json").out)
    assert second["step"] == 4 and len((out / "metrics.jsonl").read_text().splitlines()) == 4


def test_train_prints_figures_and_where_they_lie(zoo, tiny, tmp_path):
    printed = zoo("train", tiny, "train.seed=1", "--out", tmp_path / "run")
    assert "bits per byte" in printed.out and str(tmp_path / "run") in printed.out


def test_train_refuses_in_one_line(zoo, tiny, trained, tmp_path):
    assert "holds a run" in zoo("train", tiny, "--out", trained, code=2).err
    assert "did you mean lr" in zoo("train", tiny, "train.lrr=1", code=2).err
    assert "no such file" in zoo("train", tiny, "data.source=/nope", "--out", tmp_path / "x", code=2).err
    assert not (tmp_path / "x").exists()
    zoo("train", tiny, "--steps", 0, code=2)


def test_interrupted_training_exits_130_and_says_how_to_go_on(zoo, tiny, tmp_path, monkeypatch):
    from zoo.train import run

    result = run.RunResult(tmp_path, 3, 9, True, 10, 1.0, 1.0, 1.0, None, None, None)
    monkeypatch.setattr(run, "train", lambda *args, **kwargs: result)
    out = zoo("train", tiny, "--out", tmp_path, code=130).out
    assert f"zoo train {tmp_path} --resume --steps 9" in out


def test_generate_streams_the_text_of_generate(zoo, trained):
    out = zoo("generate", trained, "--prompt", "the ", "--max-new-tokens", 12, "--temperature", 0).out
    document = json.loads(
        zoo("generate", trained, "--prompt", "the ", "--max-new-tokens", 12, "--temperature", 0, "--json").out
    )
    assert out == f"the {document['text']}\n" or "\N{REPLACEMENT CHARACTER}" in out
    assert document["tokens"] <= 12 and document["stopped"] in ("end", "length")
    import torch

    ids = torch.tensor([[256, *b"the "]])
    made = package.from_pretrained(trained).generate(ids, 12)[0, 5:].tolist()
    made = made[: made.index(256)] if 256 in made else made
    assert bytes(made).decode("utf-8", "replace") == document["text"]


def test_the_same_seed_gives_the_same_text(zoo, trained):
    texts = [zoo("generate", trained, "--prompt", "", "--max-new-tokens", 20, "--seed", 5).out for _ in range(2)]
    assert texts[0] == texts[1]


def test_generate_from_a_built_model(zoo, tiny, tmp_path):
    zoo("build", tiny, "--out", tmp_path / "m")
    zoo("generate", tmp_path / "m", "--prompt", "a", "--max-new-tokens", 3)


def test_block_diffusion_generates(zoo, tmp_path):
    zoo("build", "bd3_small", "dim=32", "trunk[0].repeat=1", "--out", tmp_path / "m")
    more = ("--max-new-tokens", 20, "--threshold", 0.5, "--sub-block", 8, "--seed", 1)
    texts = [json.loads(zoo("generate", tmp_path / "m", "--prompt", "ab", *more, "--json").out) for _ in range(2)]
    assert texts[0]["text"] == texts[1]["text"] and 0 < texts[0]["tokens"] <= 20
    assert "sub_block=5" in zoo("generate", tmp_path / "m", "--prompt", "a", "--sub-block", 5, code=2).err


def test_generate_refuses(zoo, tmp_path, tiny):
    assert "config.yaml" in zoo("generate", tmp_path, "--prompt", "a", code=2).err
    zoo("build", tiny, "vocab_size=50", "--out", tmp_path / "small")
    assert "for block diffusion" in zoo("generate", tmp_path / "small", "--prompt", "a", "--threshold", 0.9, code=2).err
    assert "knows 50 tokens" in zoo("generate", tmp_path / "small", "--prompt", "a", code=2).err


def test_characters_come_whole():
    said: list[str] = []
    text = _Text(lambda ids: bytes(ids).decode("utf-8", "replace"), said.append)
    for byte in "aé漢😀b".encode():
        text.add(byte)
    text.finish()
    assert "".join(said) == text.said == "aé漢😀b"
    assert "é" in said and "漢" in said and "😀" in said


def test_what_is_no_character_is_told_in_the_end():
    said: list[str] = []
    text = _Text(lambda ids: bytes(ids).decode("utf-8", "replace"), said.append)
    for byte in b"a\xe2\x82":
        text.add(byte)
    text.finish()
    assert "".join(said).startswith("a\N{REPLACEMENT CHARACTER}")


def test_control_characters_do_not_reach_the_terminal(zoo, trained, monkeypatch):
    from zoo.train.tokenizer import ByteTokenizer

    monkeypatch.setattr(ByteTokenizer, "decode", lambda self, ids: "\x1b[2J" * len(list(ids)))
    assert "\x1b" not in zoo("generate", trained, "--prompt", "a", "--max-new-tokens", 3).out
