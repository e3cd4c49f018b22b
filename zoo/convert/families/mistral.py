"""Mistral (arXiv:2310.06825): Llama with a window, the same in all layers."""

from __future__ import annotations

from typing import Any

from zoo.convert.families import llama
from zoo.convert.settings import Settings

rules = llama.rules


def document(s: Settings) -> dict[str, Any]:
    """The configuration."""
    return llama.by_window(s, llama.one_window(s), {"swiglu": llama.swiglu(s)})
