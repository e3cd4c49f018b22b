"""Qwen 3 with experts (arXiv:2505.09388): mixtures in all layers or in some."""

from __future__ import annotations

from typing import Any

from zoo.convert.families import llama
from zoo.convert.settings import Settings

rules = llama.rules


def document(s: Settings) -> dict[str, Any]:
    """The configuration."""
    s.expect(use_sliding_window=(False, True))  # sliding_window is null where it is false
    moe = {
        "num_experts": s.num_local_experts, "top_k": s.num_experts_per_tok, "hidden_dim": s.moe_intermediate_size,
        "renormalize": s.norm_topk_prob, "aux_coef": s.router_aux_loss_coef,
    }  # fmt: skip
    attention = llama.attention(s, s.get("sliding_window"), qk_norm="head", norm_eps=s.rms_norm_eps)
    kinds = {"sparse": {"moe": moe}, "dense": {"swiglu": llama.swiglu(s)}}
    names = ["sparse" if sparse else "dense" for sparse in has_experts(s, s.num_local_experts)]
    return llama.stack(s, [(name, [{"attention": attention}, kinds[name]]) for name in names])


def has_experts(s: Settings, experts: int) -> list[bool]:
    """Which layers have a mixture in the place of the feed-forward layer."""
    dense, step = s.mlp_only_layers, s.decoder_sparse_step
    return [i not in dense and experts > 0 and (i + 1) % step == 0 for i in range(s.num_hidden_layers)]
