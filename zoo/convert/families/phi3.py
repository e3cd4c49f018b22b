"""Phi 3 (arXiv:2404.14219): Llama with fused projections."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from zoo.architectures.model import Model
from zoo.convert.families import _layers, llama
from zoo.convert.rules import Rule, divided, same
from zoo.convert.settings import Settings


def document(s: Settings) -> dict[str, Any]:
    """The configuration."""
    s.expect(attention_bias=(False, None), lm_head_bias=False, mlp_bias=False)
    _layers.idle(s, "full_attn_mod", "interpolate_factor")  # of published files; the original does not read them
    return llama.by_window(s, llama.one_window(s), {"swiglu": llama.swiglu(s)}, partial=True)


def rules(s: Settings, model: Model) -> Iterator[Rule]:
    """What each tensor is in theirs."""
    yield from _layers.ends(s, "model.embed_tokens", "model.norm")
    keys = s.get("num_key_value_heads", s.num_attention_heads)
    sizes = [heads * llama.head_dim(s) for heads in (s.num_attention_heads, keys, keys)]
    yield from _layers.norms(model, "input_layernorm", "post_attention_layernorm")
    for mixer, ffn, theirs in _layers.pairs(model):
        parts = [f"{mixer}.block.{name}_proj.weight" for name in "qkv"]
        yield divided(parts, f"{theirs}.self_attn.qkv_proj.weight", sizes)
        yield same(f"{mixer}.block.o_proj.weight", f"{theirs}.self_attn.o_proj.weight")
        halves = [f"{ffn}.block.{name}_proj.weight" for name in ("gate", "up")]
        yield divided(halves, f"{theirs}.mlp.gate_up_proj.weight", [s.intermediate_size] * 2)
        yield same(f"{ffn}.block.down_proj.weight", f"{theirs}.mlp.down_proj.weight")
