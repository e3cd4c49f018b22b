"""DeepSeek-V3 (arXiv:2412.19437): latent attention, and behind the first layers experts chosen within groups."""

from __future__ import annotations

from typing import Any

from zoo.convert.families import _layers, llama
from zoo.convert.settings import Settings

rules = llama.rules


def document(s: Settings) -> dict[str, Any]:
    """The configuration."""
    s.expect(
        num_key_value_heads=s.num_attention_heads, scoring_func="sigmoid", topk_method="noaux_tc", moe_layer_freq=1,
    )  # fmt: skip
    # sums of others, how it was trained, and heads for further tokens, which are no part of the model
    _layers.idle(
        s, "head_dim", "qk_head_dim", "aux_loss_alpha", "seq_aux", "ep_size", "num_nextn_predict_layers"
    )  # fmt: skip
    mla = {
        "num_heads": s.num_attention_heads, "kv_lora_rank": s.kv_lora_rank, "qk_nope_head_dim": s.qk_nope_head_dim,
        "qk_rope_head_dim": s.qk_rope_head_dim, "v_head_dim": s.v_head_dim,
        "rope_interleaved": bool(s.get("rope_interleave", True)),
    } | llama.rope(s)  # fmt: skip
    mla |= _layers.given(q_lora_rank=(s.get("q_lora_rank"), None), bias=(bool(s.get("attention_bias")), False))
    moe = {
        "num_experts": s.n_routed_experts, "top_k": s.num_experts_per_tok, "hidden_dim": s.moe_intermediate_size,
        "num_shared_experts": s.n_shared_experts, "score": "sigmoid", "renormalize": bool(s.get("norm_topk_prob")),
        "route_scale": float(s.routed_scaling_factor), "num_groups": s.n_group, "top_groups": s.topk_group,
        "balance": "bias",
    }  # fmt: skip
    dense, sparse = [{"mla": mla}, {"swiglu": llama.swiglu(s)}], [{"mla": mla}, {"moe": moe}]
    first = s.get("first_k_dense_replace", 0)
    return llama.stack(s, [("dense", dense) if i < first else ("sparse", sparse) for i in range(s.num_hidden_layers)])
