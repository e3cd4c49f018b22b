"""zoo data."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("".join(f"the quick brown fox number {i}\n" for i in range(3000)))
    return path


def test_prepare_show_check_and_train(zoo, text, tiny, tmp_path):
    made = zoo("data", "prepare", text, "--out", tmp_path / "p")
    assert "train tokens" in made.out and "tokenizing" in made.err
    document = json.loads(zoo("data", "show", tmp_path / "p", "--json").out)
    assert document["train_bytes"] + document["heldout_bytes"] == text.stat().st_size
    again = json.loads(zoo("data", "prepare", text, "--out", tmp_path / "p", "--json").out)
    assert again == document
    assert "as it was written" in zoo("data", "check", tmp_path / "p").out
    pytest.importorskip("torchtitan")
    out = tmp_path / "run"
    mapped, memory = (
        json.loads(zoo("train", tiny, f"data.source={source}", "data.doc_ids=true", "--out", folder, "--json").out)
        for source, folder in ((tmp_path / "p", out), (text, tmp_path / "m"))
    )
    assert mapped["evaluation"]["heldout_bytes"] == 500
    for figure in ("loss", "evaluation"):  # the same rows, whether they lie in memory or on disk
        assert mapped[figure] == memory[figure]
    shard = tmp_path / "p" / "train-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-9])
    assert "has" in zoo("train", out, "--resume", "--steps", 6, code=2).err
    assert "prepare it again" in zoo("data", "check", tmp_path / "p", code=2).err


def test_refusals_are_one_line(zoo, text, tmp_path):
    assert "no such file" in zoo("data", "prepare", "/nope", "--out", tmp_path / "p", code=2).err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    assert "not an empty folder" in zoo("data", "prepare", text, "--out", tmp_path / "full", code=2).err
    assert "is not finished" in zoo("data", "show", tmp_path, code=2).err


def test_preparing_needs_no_torch(text, tmp_path):
    code = (
        "import sys; from zoo.cli import main\n"
        "try: main(sys.argv[1:])\nfinally: assert 'torch' not in sys.modules, 'torch'"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "data", "prepare", text, "--out", tmp_path / "p"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "Error" not in done.stderr, done.stderr
