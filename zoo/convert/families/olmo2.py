"""OLMo 2 (arXiv:2501.00656): norms of what the blocks say, and of all channels of queries and keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from zoo.architectures.model import Model
from zoo.convert.families import _layers, llama
from zoo.convert.rules import Rule
from zoo.convert.settings import Settings


def document(s: Settings) -> dict[str, Any]:
    """The configuration."""
    norm = {"qk_norm": "full", "norm_eps": s.rms_norm_eps}
    layers = [None] * s.num_hidden_layers
    return llama.by_window(s, layers, {"swiglu": llama.swiglu(s)}, **norm) | {"residual": "reordered"}


def rules(s: Settings, model: Model) -> Iterator[Rule]:
    """What each tensor is in theirs."""
    yield from _layers.ends(s, "model.embed_tokens", "model.norm")
    yield from _layers.norms(model, "post_attention_layernorm", "post_feedforward_layernorm")
    yield from _layers.blocks(model, "self_attn", "mlp")
