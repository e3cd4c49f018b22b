"""DINOv2 with registers (arXiv:2309.16588)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from zoo.architectures.model import Model
from zoo.convert.families import _layers, dinov2
from zoo.convert.rules import Rule
from zoo.convert.settings import Settings


def document(s: Settings) -> dict[str, Any]:
    """The configuration."""
    _layers.idle(s, "interpolate_antialias", "interpolate_offset")  # of published files; the original does not read it
    return dinov2.document(s, "Dinov2WithRegisters", num_registers=s.num_register_tokens, antialias=True)


def rules(s: Settings, model: Model) -> Iterator[Rule]:
    """What each tensor is in theirs."""
    yield from dinov2.rules(s, model, "dinov2_with_registers.")
