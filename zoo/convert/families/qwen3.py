"""Qwen 3 (arXiv:2505.09388): a norm of each head of queries and keys."""

from __future__ import annotations

from typing import Any

from zoo.convert.families import llama
from zoo.convert.settings import Settings

rules = llama.rules


def document(s: Settings) -> dict[str, Any]:
    """The configuration."""
    norm = {"qk_norm": "head", "norm_eps": s.rms_norm_eps}
    return llama.by_window(s, llama.windows(s), {"swiglu": llama.swiglu(s)}, **norm)
