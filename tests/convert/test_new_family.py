"""The family of docs/convert.md, as it stands there."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from models import BIASES, made
from parity import measure

from zoo.convert import families

DOCS = Path(__file__).resolve().parents[2] / "docs" / "convert.md"


@pytest.fixture
def arcee(tmp_path, monkeypatch):
    code = [c for c in re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL) if "def document" in c]
    assert len(code) == 1
    (tmp_path / "arcee.py").write_text(code[0])
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path)])
    yield
    sys.modules.pop("zoo.convert.families.arcee", None)


@pytest.mark.parametrize("options", [{}, {**BIASES, "mlp_bias": True, "hidden_act": "gelu"}])
def test_one_file_makes_a_family(arcee, options):
    found = measure(made("Arcee", **options))
    assert found.error < 1e-4 and found.error_fp64 < 1e-9
    assert found.generation and found.round_trip


def test_it_is_not_there_otherwise():
    assert "arcee" not in families.names()
