"""Qwen3-Next: Gated DeltaNet and attention with a gated output, experts with a gated shared one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from zoo.architectures.model import Model
from zoo.convert.families import _layers, llama, qwen3_moe
from zoo.convert.rules import Rule, alike, divided, same
from zoo.convert.settings import Settings


def document(s: Settings) -> dict[str, Any]:
    """The configuration."""
    s.expect(use_sliding_window=False)
    _layers.idle(s, "num_hidden_layers", "full_attention_interval", "partial_rotary_factor")
    delta = {
        "num_heads": s.linear_num_key_heads, "num_v_heads": s.linear_num_value_heads,
        "head_dim": s.linear_key_head_dim, "expand_v": s.linear_value_head_dim / s.linear_key_head_dim,
        "conv_size": s.linear_conv_kernel_dim, "norm_eps": s.rms_norm_eps,
    }  # fmt: skip
    attention = llama.attention(s, partial=True) | {
        "qk_norm": "head", "norm_eps": s.rms_norm_eps, "norm_zero_centered": True, "output_gate": True,
    }  # fmt: skip
    moe = {
        "num_experts": s.num_experts, "top_k": s.num_experts_per_tok, "hidden_dim": s.moe_intermediate_size,
        "shared_dim": s.shared_expert_intermediate_size, "shared_gate": True, "renormalize": s.norm_topk_prob,
        "aux_coef": s.router_aux_loss_coef,
    }  # fmt: skip
    define = {
        "delta": {"gated_deltanet": delta}, "full": {"attention": attention}, "experts": {"moe": moe},
        "dense": {"swiglu": llama.swiglu(s)}, "de": ["delta", "experts"], "dd": ["delta", "dense"],
        "fe": ["full", "experts"], "fd": ["full", "dense"],
    }  # fmt: skip
    layers = [
        ("d" if kind == "linear_attention" else "f") + ("e" if sparse else "d")
        for kind, sparse in zip(s.layer_types, qwen3_moe.has_experts(s, s.num_experts), strict=True)
    ]
    return _layers.body(s, s.rms_norm_eps, define, layers, zero_centered=True)


def rules(s: Settings, model: Model) -> Iterator[Rule]:
    """What each tensor is in theirs."""
    yield from _layers.ends(s, "model.embed_tokens", "model.norm")
    yield from _layers.norms(model, "input_layernorm", "post_attention_layernorm")
    for i, (mixer, ffn, theirs) in enumerate(_layers.pairs(model)):
        yield from alike(model, f"{ffn}.block", f"{theirs}.mlp", shared_experts="shared_expert")
        if s.layer_types[i] == "linear_attention":
            yield from _delta_rules(s, f"{mixer}.block", f"{theirs}.linear_attn")
        else:
            yield from alike(model, f"{mixer}.block", f"{theirs}.self_attn")


def _delta_rules(s: Settings, ours: str, theirs: str) -> Iterator[Rule]:
    """Gated DeltaNet: rows of one projection per key head, q, k, its values and their gates."""
    heads, width, shared = s.linear_num_key_heads, s.linear_key_head_dim, s.linear_num_value_heads
    shared //= heads
    values = shared * s.linear_value_head_dim
    yield _by_heads([f"{ours}.{n}_proj.weight" for n in "qkvg"], f"{theirs}.in_proj_qkvz.weight", heads,
                    [width, width, values, values])  # fmt: skip
    yield _by_heads([f"{ours}.{n}_proj.weight" for n in "ba"], f"{theirs}.in_proj_ba.weight", heads, [shared] * 2)
    channels = [heads * width, heads * width, heads * values]
    yield divided([f"{ours}.{n}_conv1d.weight" for n in "qkv"], f"{theirs}.conv1d.weight", channels)
    for name in ("A_log", "dt_bias"):
        yield same(f"{ours}.{name}", f"{theirs}.{name}")
    yield same(f"{ours}.o_norm.weight", f"{theirs}.norm.weight")
    yield same(f"{ours}.o_proj.weight", f"{theirs}.out_proj.weight")


def _by_heads(ours: list[str], theirs: str, heads: int, sizes: list[int]) -> Rule:
    """Several of ours are one of theirs, whose rows come head by head, in each of these sizes."""

    def there(tensors: list[Tensor]) -> list[Tensor]:
        return [part.flatten(0, 1) for part in tensors[0].unflatten(0, (heads, -1)).split(sizes, 1)]

    def back(tensors: list[Tensor]) -> list[Tensor]:
        return [torch.cat([t.unflatten(0, (heads, -1)) for t in tensors], 1).flatten(0, 1)]

    return Rule(tuple(ours), (theirs,), there, back)
