"""Running commands in this process, and a small trained run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from zoo.cli import main

TINY = """\
name: tiny
dim: 32
vocab_size: 257
trunk:
  - {repeat: 3, of: [swiglu]}
  - {loop: {steps: 2}, of: [{mlp: {hidden_dim: 48}}]}
train: {steps: 4, batch_size: 2, seq_len: 32, eval_every: 2, eval_batches: 1, checkpoint_every: 2, warmup_steps: 1}
data: {source: SOURCE, heldout_bytes: 500}
"""


@pytest.fixture
def zoo(capsys) -> Callable[..., Any]:
    """`zoo("build", "x", code=2)` runs a command, checks its exit code and returns what it printed."""

    def run(*args: object, code: int = 0) -> Any:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(a) for a in args])
        printed = capsys.readouterr()
        assert (end.value.code or 0) == code, printed
        assert "Traceback" not in printed.err
        return printed

    return run


@pytest.fixture(autouse=True)
def no_calibration(monkeypatch, tmp_path) -> None:
    """Nothing is known of this machine."""
    monkeypatch.setattr("zoo.predict.calibration.folder", lambda: tmp_path / "cache")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A configuration of no size, with data of its own."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 100)
    path = folder / "tiny.yaml"
    path.write_text(TINY.replace("SOURCE", str(folder / "text.txt")))
    return path


@pytest.fixture(scope="session")
def trained(tiny) -> Path:
    """The run folder of a short training."""
    folder = tiny.parent / "run"
    with pytest.raises(SystemExit) as end:
        main(["train", str(tiny), "--out", str(folder)])
    assert not end.value.code
    return folder
