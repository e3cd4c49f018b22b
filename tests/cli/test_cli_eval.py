"""zoo eval."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("torchtitan")


def test_eval_tells_what_the_run_was_judged_by(zoo, trained):
    found = json.loads(zoo("eval", trained, "--tasks", "heldout", "--json").out)
    assert [f["task"] for f in found] == ["heldout"]
    assert found[0]["figures"] == json.loads((trained / "evaluation.json").read_text())
    assert json.loads((trained / "evaluation" / "heldout.json").read_text()) == found[0]


def test_eval_prints_tables(zoo, trained):
    out = zoo("eval", trained, "--lengths", "300,100", "--samples", 2).out
    assert "bits per byte" in out and "share of 2 keys found" in out and "needs 1" in out
    assert str(trained / "evaluation") in out
    assert "not trained on it" in zoo("eval", trained, "--tasks", "induction", "--samples", 2).out


def test_eval_refuses(zoo, trained, tmp_path):
    assert "whole numbers" in zoo("eval", trained, "--lengths", "a", code=2).err
    assert "did you mean mqar" in zoo("eval", trained, "--tasks", "mqarr", code=2).err
    assert "config.yaml" in zoo("eval", tmp_path, code=2).err
    assert "only data and train" in zoo("eval", trained, "dim=64", code=2).err
