"""Kimi Linear (arXiv:2510.26692): Kimi Delta Attention and latent attention without positions, experts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from zoo.architectures.model import Model
from zoo.convert.families import _layers, llama
from zoo.convert.rules import Rule
from zoo.convert.settings import Settings

# stand in published configurations; the original does not read them
UNUSED = (
    "first_k_dense_replace", "linear_attn_config", "mla_use_nope", "model_max_length", "moe_layer_freq",
    "num_nextn_predict_layers", "rope_parameters", "rope_scaling", "rope_theta", "use_grouped_topk",
)  # fmt: skip


def document(s: Settings) -> dict[str, Any]:
    """The configuration."""
    s.expect(moe_router_activation_func="sigmoid")
    _layers.idle(s, "head_dim", "qk_head_dim", "num_hidden_layers", "num_key_value_heads", *UNUSED)
    if not s.num_shared_experts:
        raise s.refused("num_shared_experts: 0", "the original has an empty layer for them")
    kda = {
        "num_heads": s.linear_num_heads, "head_dim": s.linear_head_dim, "conv_size": s.linear_conv_kernel_dim,
        "norm_eps": s.rms_norm_eps,
    }  # fmt: skip
    mla = {
        "num_heads": s.num_attention_heads, "kv_lora_rank": s.kv_lora_rank, "qk_nope_head_dim": s.qk_nope_head_dim,
        "qk_rope_head_dim": s.qk_rope_head_dim, "v_head_dim": s.v_head_dim, "rope": False,
    } | _layers.given(q_lora_rank=(s.get("q_lora_rank"), None), bias=(s.attention_bias, False))  # fmt: skip
    moe = {
        "num_experts": s.num_experts, "top_k": s.num_experts_per_token, "hidden_dim": s.moe_intermediate_size,
        "num_shared_experts": s.num_shared_experts, "score": "sigmoid", "renormalize": s.moe_renormalize,
        "route_scale": s.routed_scaling_factor, "num_groups": s.num_expert_group, "top_groups": s.topk_group,
        "balance": "bias",
    }  # fmt: skip
    define = {
        "rec": {"kda": kda}, "full": {"mla": mla}, "experts": {"moe": moe}, "dense": {"swiglu": llama.swiglu(s)},
        "re": ["rec", "experts"], "rd": ["rec", "dense"], "fe": ["full", "experts"], "fd": ["full", "dense"],
    }  # fmt: skip
    layers = [
        ("r" if mixer == "linear_attention" else "f") + ("e" if ffn == "sparse" else "d")
        for mixer, ffn in zip(s.layer_types, s.mlp_layer_types, strict=True)
    ]
    made = _layers.body(s, s.rms_norm_eps, define, layers)
    return made | {"tie_embeddings": False}  # the original has no tied form, whatever tie_word_embeddings says


def rules(s: Settings, model: Model) -> Iterator[Rule]:
    """What each tensor is in theirs."""
    yield from _layers.ends(s, "model.embed_tokens", "model.norm", tied=False)
    yield from _layers.norms(model, "input_layernorm", "post_attention_layernorm")
    yield from _layers.blocks(model, "self_attn", "mlp")
