"""tools/overhead: the bare loop does the same work as `zoo train`, to the bit."""

import sys
from pathlib import Path

import pytest
from tiny_runs import DENSE, texts

import zoo.train.titan
from zoo.train import prepare

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import overhead  # pyright: ignore[reportMissingImports]


def test_a_bare_loop_learns_the_same(monkeypatch, tmp_path):
    monkeypatch.setattr(prepare, "SAMPLE_TOKENS", 8)
    source = texts(tmp_path / "texts")
    fit = zoo.train.titan.fit
    monkeypatch.setitem(overhead.MODELS, "dense", (DENSE, []))
    monkeypatch.setattr(overhead, "RECIPE", [f"data.source={source}", "train.eval_every=0"])
    found = overhead.measure("dense", overhead.FIRST + 3)
    assert found["largest_relative_difference_of_losses"] == 0
    assert found["steps"] == 3 and found["tokens_per_step"] == 4 * 24
    assert found["ratio"] == pytest.approx(found["zoo_tokens_per_second"] / found["bare_tokens_per_second"])
    assert zoo.train.titan.fit is fit
