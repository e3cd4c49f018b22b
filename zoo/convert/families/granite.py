"""Granite 3 (IBM 2024): Llama with multipliers of the embedding, the branches, the scores and the logits."""

from __future__ import annotations

from typing import Any

from zoo.convert.families import llama
from zoo.convert.settings import Settings

rules = llama.rules


def document(s: Settings) -> dict[str, Any]:
    """The configuration."""
    layers = [None] * s.num_hidden_layers
    made = llama.by_window(s, layers, {"swiglu": llama.swiglu(s)}, scale=float(s.attention_multiplier))
    made |= {"embedding_scale": float(s.embedding_multiplier), "logit_scale": 1 / s.logits_scaling}
    return made | {"residual": {"scale": float(s.residual_multiplier)}}
