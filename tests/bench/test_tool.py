"""tools/bench/run.py: the plan, and the table made of kept documents."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from zoo.cli import main


@pytest.fixture(scope="module")
def tool():
    path = Path(__file__).resolve().parents[2] / "tools" / "bench" / "run.py"
    spec = importlib.util.spec_from_file_location("bench_run", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_plan(tool):
    cpu, cuda = tool.plan("cpu"), tool.plan("cuda")
    assert cpu["layers"] == ["layers", "--compiled", "--device", "cpu", "--save"]
    assert cpu["layers bfloat16"] == ["layers", "--dtype", "bfloat16", "--device", "cpu", "--save"]
    assert "layers bfloat16" not in cuda and "delta_rule" in cuda


def test_the_table(tool, tmp_path, monkeypatch):
    from zoo.bench import machine, session

    measure = machine.peaks
    monkeypatch.setattr(machine, "peaks", lambda device, dtype: measure(device, dtype, width=64, rounds=1))
    monkeypatch.setattr(session, "results_folder", lambda: tmp_path)
    for args in (("rope", "--seq", "16"), ("scaling", "--only", "short_conv", "--seq", "16,32")):
        with pytest.raises(SystemExit) as end:
            main(["bench", *args, "--rounds", "1", "--save"])
        assert not end.value.code
    (folder,) = tmp_path.iterdir()
    document = json.loads((folder / "rope.json").read_text())
    document["groups"][0]["wanted"] = 1.5
    (folder / "rope.json").write_text(json.dumps(document))
    text = tool.table(folder)
    assert "## What is wanted" in text and "## Everything else" in text and "| 16 to 32 |" in text
    (line,) = (line for line in text.splitlines() if "| 1.5 |" in line)
    assert line.startswith("| rope | forward T=16 | float32 |") and "apply_rotary_pos_emb" in line
