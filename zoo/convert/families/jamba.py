"""Jamba (arXiv:2403.19887): Mamba with normed dt, B and C, attention without positions, experts in some layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from zoo.architectures.model import Model
from zoo.convert.families import _layers, llama
from zoo.convert.rules import Rule
from zoo.convert.settings import Settings

# stand in published configurations; the original does not read them
UNUSED = ("calc_logits_for_entire_prompt", "mamba_inner_layernorms", "n_ctx", "sliding_window")


def _attends(s: Settings, i: int) -> bool:
    return i % s.attn_layer_period == s.attn_layer_offset


def _has_experts(s: Settings, i: int) -> bool:
    return s.num_experts > 1 and i % s.expert_layer_period == s.expert_layer_offset


def document(s: Settings) -> dict[str, Any]:
    """The configuration."""
    _layers.idle(s, "expert_layer_offset", "expert_layer_period", *UNUSED)
    mamba = {
        "state_dim": s.mamba_d_state, "expand": s.mamba_expand, "conv_size": s.mamba_d_conv,
        "dt_rank": s.mamba_dt_rank, "bcdt_norm": True, "norm_eps": s.rms_norm_eps,
    } | _layers.given(bias=(s.mamba_proj_bias, False), conv_bias=(s.mamba_conv_bias, True))  # fmt: skip
    attention = {"num_heads": s.num_attention_heads, "num_kv_heads": s.num_key_value_heads, "rope": False}
    moe = {
        "num_experts": s.num_experts, "top_k": s.num_experts_per_tok, "hidden_dim": s.intermediate_size,
        "renormalize": False, "aux_coef": s.router_aux_loss_coef,
    }  # fmt: skip
    define = {
        "ssm": {"mamba": mamba}, "full": {"attention": attention}, "dense": {"swiglu": llama.swiglu(s)},
        "experts": {"moe": moe}, "md": ["ssm", "dense"], "me": ["ssm", "experts"], "ad": ["full", "dense"],
        "ae": ["full", "experts"],
    }  # fmt: skip
    layers = [
        ("a" if _attends(s, i) else "m") + ("e" if _has_experts(s, i) else "d") for i in range(s.num_hidden_layers)
    ]
    return _layers.body(s, s.rms_norm_eps, define, layers)


def rules(s: Settings, model: Model) -> Iterator[Rule]:
    """What each tensor is in theirs."""
    yield from _layers.ends(s, "model.embed_tokens", "model.final_layernorm")
    yield from _layers.norms(model, "input_layernorm", "pre_ff_layernorm")
    mixers = ["self_attn" if _attends(s, i) else "mamba" for i in range(s.num_hidden_layers)]
    yield from _layers.blocks(model, mixers, "feed_forward", gate="router")
