"""Every Triton kernel compiles for GPUs that are not here, with the registers, spills, shared memory and matrix
instructions of the committed table."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("aot", ROOT / "tools" / "aot.py")
aot = importlib.util.module_from_spec(spec)
spec.loader.exec_module(aot)


def tables():
    return {path.stem: json.loads(path.read_text()) for path in aot.TABLES.glob("triton-*.json")}


@pytest.mark.slow
@pytest.mark.parametrize("target", aot.TARGETS)
def test_compiles_as_committed(target, tmp_path):
    command = [sys.executable, str(ROOT / "tools" / "aot.py"), "--check", "--arch", target]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


def test_tables_of_both_compilers_hold_every_kernel_and_no_defect():
    found = tables()
    assert any(name.startswith("triton-3.6") for name in found) and len(found) >= 2
    kernels = {name: {target: set(rows) for target, rows in table.items()} for name, table in found.items()}
    first = next(iter(kernels.values()))
    assert set(first) == set(aot.TARGETS)
    for table in kernels.values():
        assert table == first
    for table in found.values():
        assert aot.problems(table) == []


def test_a_defect_is_named():
    good = {"registers": 90, "spill_stores": 0, "spill_loads": 0, "shared": 1000, "products": 1, "matrix": 4, "half": 1}
    assert aot.problems({"80": {"op/a/x_forward": good}}) == []
    assert "spills" in aot.problems({"80": {"op/a/x_forward": good | {"spill_loads": 2}}})[0]
    assert aot.problems({"80": {"op/a/x_backward": good | {"spill_loads": 2}}}) == []
    assert "tensor-core" in aot.problems({"90": {"op/a/x_forward": good | {"matrix": 0}}})[0]
    assert "cannot be launched" in aot.problems({"80": {"op/a/x_forward": good | {"shared": 200_000}}})[0]
    assert aot.problems({"90": {"op/a/x_forward": good | {"shared": 200_000}}}) == []
