"""Qwen 2 and 2.5 (arXiv:2407.10671): biases of queries, keys and values; a window in the upper layers, if at all."""

from __future__ import annotations

from typing import Any

from zoo.convert.families import llama
from zoo.convert.settings import Settings

rules = llama.rules


def document(s: Settings) -> dict[str, Any]:
    """The configuration."""
    s.expect(use_mrope=(False, None))
    return llama.by_window(s, llama.windows(s), {"swiglu": llama.swiglu(s)}, bias=True, out_bias=False)
