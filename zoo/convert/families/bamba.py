"""Bamba: Mamba-2, a few layers of attention with half its channels rotated, a feed-forward layer behind each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from zoo.architectures.model import Model
from zoo.convert.families import _layers, llama
from zoo.convert.rules import Rule
from zoo.convert.settings import Settings


def _attends(s: Settings, i: int) -> bool:
    return i in s.get("attn_layer_indices", [])


def document(s: Settings) -> dict[str, Any]:
    """The configuration."""
    # which channels are rotated also stands in rope_parameters
    _layers.idle(s, "z_loss_coefficient", "partial_rotary_factor", "attn_rotary_emb")
    define = {
        "ssm": {"mamba2": _layers.mamba2(s, s.mamba_expand * s.hidden_size)},
        "full": {"attention": llama.attention(s, partial=True)},
        "dense": {"swiglu": llama.swiglu(s)},
        "m": ["ssm", "dense"],
        "a": ["full", "dense"],
    }
    layers = ["a" if _attends(s, i) else "m" for i in range(s.num_hidden_layers)]
    return _layers.body(s, s.rms_norm_eps, define, layers)


def rules(s: Settings, model: Model) -> Iterator[Rule]:
    """What each tensor is in theirs."""
    yield from _layers.ends(s, "model.embed_tokens", "model.final_layernorm")
    yield from _layers.norms(model, "input_layernorm", "pre_ff_layernorm")
    mixers = ["self_attn" if _attends(s, i) else "mamba" for i in range(s.num_hidden_layers)]
    yield from _layers.blocks(model, mixers, "feed_forward")
