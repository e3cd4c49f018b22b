"""Classes of the graph by their names."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

BLOCKS: dict[str, type] = {}  # filled at the end of the file


def load(name: str) -> type:
    """Class of a block, norm, router or combinator."""
    return BLOCKS[name]


def options(name: str) -> Mapping[str, Any]:
    """The options of its constructor."""
    return inspect.signature(load(name).__init__).parameters


def component(kind: str, value: str | Mapping[str, Any]) -> Any:
    """What an option of a block names, `quest` or {quest: {options}}, built."""
    name, given = (value, None) if isinstance(value, str) else next(iter(value.items()))
    return load(name)(**(given or {}))
