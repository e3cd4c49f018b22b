"""Nemotron-H (arXiv:2504.03624): Mamba-2, attention without positions and MLPs, each alone in its residual branch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from zoo.architectures.model import Model
from zoo.convert.families import _layers
from zoo.convert.rules import Rule, alike, residual_blocks, same
from zoo.convert.settings import Settings

# stand in published configurations; the original does not read them
UNUSED = (
    "attention_head_dim", "norm_eps", "partial_rotary_factor", "rms_norm_eps", "rope_parameters", "rope_theta",
)  # fmt: skip
KINDS = {"linear_attention": "ssm", "full_attention": "full", "mlp": "dense", "moe": "experts"}


def document(s: Settings) -> dict[str, Any]:
    """The configuration."""
    s.expect(mamba_hidden_act=("silu", "swish"), mlp_hidden_act=tuple(_layers.ACTIVATIONS), num_nextn_predict_layers=0)
    # not read by the original: delta is bounded by time_step_min instead, and these biases are not built
    _layers.idle(s, "attention_bias", "chunk_size", "mamba_proj_bias", "mamba_ssm_cache_dtype", "time_step_limit")
    _layers.idle(s, "expand", "moe_shared_expert_overlap", "mtp_layers_block_type", "sliding_window", *UNUSED)
    mamba2 = {
        "num_heads": s.mamba_num_heads, "head_dim": s.mamba_head_dim, "state_dim": s.ssm_state_size,
        "num_groups": s.n_groups, "expand": s.mamba_num_heads * s.mamba_head_dim / s.hidden_size,
        "conv_size": s.conv_kernel, "norm_eps": s.layer_norm_epsilon,
    } | _layers.given(bias=(s.use_bias, False), conv_bias=(s.use_conv_bias, True))  # fmt: skip
    mamba2 |= _layers.step_limit([s.time_step_min, float("inf")])
    attention = {"num_heads": s.num_attention_heads, "num_kv_heads": s.num_key_value_heads, "head_dim": s.head_dim}
    mlp = {"hidden_dim": s.intermediate_size, "activation": _layers.ACTIVATIONS[s.mlp_hidden_act], "bias": s.mlp_bias}
    define = {
        "ssm": {"mamba2": mamba2}, "full": {"attention": attention | {"rope": False}}, "dense": {"mlp": mlp},
        "experts": {"moe": _moe(s)},
    }  # fmt: skip
    made = _layers.body(s, s.layer_norm_epsilon, define, [KINDS[kind] for kind in s.layers_block_type])
    return made | {"tie_embeddings": False}  # the original has no tied form, whatever tie_word_embeddings says


def _moe(s: Settings) -> dict[str, Any]:
    """Experts without a gate, and a shared one of another width."""
    if "moe" in s.layers_block_type:
        s.expect(moe_latent_size=None, mlp_bias=False)
    _layers.idle(s, "moe_latent_size", "n_shared_experts")  # the shared one is one, as wide as it says
    return {
        "num_experts": s.n_routed_experts, "top_k": s.num_experts_per_tok, "hidden_dim": s.moe_intermediate_size,
        "shared_dim": s.moe_shared_expert_intermediate_size, "activation": _layers.ACTIVATIONS[s.mlp_hidden_act],
        "score": "sigmoid", "renormalize": s.norm_topk_prob, "route_scale": s.routed_scaling_factor,
        "num_groups": s.n_group, "top_groups": s.topk_group, "balance": "bias",
    }  # fmt: skip


def rules(s: Settings, model: Model) -> Iterator[Rule]:
    """What each tensor is in theirs."""
    yield from _layers.ends(s, "model.embeddings", "model.norm_f", tied=False)
    for i, name in enumerate(residual_blocks(model)):
        yield same(f"{name}.norm.weight", f"model.layers.{i}.norm.weight")
        yield from alike(model, f"{name}.block", f"model.layers.{i}.mixer")
