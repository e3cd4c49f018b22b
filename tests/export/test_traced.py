"""Traced programs run where the zoo is not, at other sizes too; what cannot be traced is named."""

from __future__ import annotations

import contextlib
import subprocess
import sys

import pytest
import torch
from exported_models import MODELS

import zoo
from zoo.blocks.swiglu import SwiGLU
from zoo.errors import ConfigError, ZooError
from zoo.export import traced

STRANGER = """
import sys, torch
class NoZoo:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "zoo":
            raise ImportError("the zoo is not here")
sys.meta_path.insert(0, NoZoo())
program, tokens, out = sys.argv[1:]
torch.save(torch.export.load(program).module()(torch.load(tokens)), out)
"""


def test_a_stranger_runs_the_program(tmp_path):
    model = zoo.build(MODELS["llama"], seed=1)
    name, dynamic = traced.export_torch(model, tmp_path, 16)
    assert (name, dynamic) == ("model.pt2", ("batch", "length"))
    tokens = torch.randint(257, (5, 71))
    torch.save(tokens, tmp_path / "tokens.pt")
    files = [str(tmp_path / f) for f in (name, "tokens.pt", "logits.pt")]
    done = subprocess.run([sys.executable, "-I", "-c", STRANGER, *files], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    with torch.no_grad():
        torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), model(tokens), rtol=1e-4, atol=1e-5)


def test_sizes_that_stay(monkeypatch):
    """A recurrence is cut into chunks by a loop over the row: its length stays, and nobody asks the tracer for it."""
    asked, export = [], torch.export.export
    monkeypatch.setattr(torch.export, "export", lambda *a, **k: asked.append(k["dynamic_shapes"]) or export(*a, **k))
    model = zoo.build({**MODELS["mamba2"], "trunk": ["mamba2"]})
    assert traced.trace(model, 70).dynamic == ("batch",)
    assert [set(sizes["tokens"]) for sizes in asked] == [{0}]


def test_too_much_to_trace(monkeypatch):
    monkeypatch.setattr(traced, "MOST", 20)
    with pytest.raises(
        ConfigError, match=r"mamba2 runs \d+ operations for rows of 70, more than 20: too many to trace"
    ):
        traced.trace(zoo.build(MODELS["mamba2"]), 70)


def test_refused_by_name(tmp_path, monkeypatch, capfd):
    """A block that branches on what the tokens are."""

    def forward(self, x, *, state=None, positions=None, doc_ids=None):
        return x if x.sum() > 0 else -x

    monkeypatch.setattr(SwiGLU, "forward", forward)
    with pytest.raises(ConfigError, match=r"cannot trace swiglu: what it runs depends on what the tokens are$"):
        traced.export_torch(zoo.build(MODELS["llama"]), tmp_path / "out", 16)
    assert not (tmp_path / "out").exists()
    assert capfd.readouterr().err == ""  # torch would print its half of a program


def test_a_program_that_calls_our_operators_is_refused(monkeypatch):
    monkeypatch.setattr(traced, "portable_rows", contextlib.nullcontext)
    with pytest.raises(ConfigError, match=r"moe cannot be traced: its program would call zoo\.grouped_mm"):
        traced.trace(zoo.build(MODELS["moe"]), 16)


def test_onnx_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(traced, "find_spec", lambda name: None)
    with pytest.raises(
        ZooError, match=r"needs onnx and onnxscript, not installed here: pip install 'block-zoo\[onnx\]'"
    ):
        traced.export_onnx(zoo.build(MODELS["llama"]), tmp_path, 16)
