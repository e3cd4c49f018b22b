"""Mixtral (arXiv:2401.04088): Mistral with a mixture of experts in every layer."""

from __future__ import annotations

from typing import Any

from zoo.convert.families import llama
from zoo.convert.settings import Settings

rules = llama.rules


def document(s: Settings) -> dict[str, Any]:
    """The configuration."""
    s.expect(hidden_act=("silu", "swish"))
    moe = {
        "num_experts": s.num_local_experts, "top_k": s.num_experts_per_tok, "hidden_dim": s.intermediate_size,
        "aux_coef": s.router_aux_loss_coef,
    }  # fmt: skip
    return llama.by_window(s, llama.one_window(s), {"moe": moe})
