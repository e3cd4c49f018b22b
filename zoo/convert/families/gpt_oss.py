"""GPT-OSS (arXiv:2508.10925): sink logits, every other layer with a window, experts with biases and clamps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from zoo.architectures.model import Model
from zoo.convert.families import _layers, llama
from zoo.convert.rules import Rule, alike, changed, same
from zoo.convert.settings import Settings


def document(s: Settings) -> dict[str, Any]:
    """The configuration."""
    s.expect(hidden_act=("silu", "swish"), swiglu_alpha=1.702)
    # other names of what is read here, in the published file
    _layers.idle(s, "experts_per_token", "initial_context_length")
    moe = {
        "num_experts": s.num_local_experts, "top_k": s.num_experts_per_tok, "hidden_dim": s.intermediate_size,
        "bias": True, "swiglu_limit": float(s.swiglu_limit), "aux_coef": s.router_aux_loss_coef,
    }  # fmt: skip
    return llama.by_window(s, llama.windows(s), {"moe": moe}, sink_logits=True)


def apart(tensor: Tensor) -> Tensor:
    """Rows of gate and up in turns [E, 2 I, ...] -> those of gate first."""
    return torch.cat([tensor[:, ::2], tensor[:, 1::2]], 1)


def in_turns(tensor: Tensor) -> Tensor:
    """The inverse of `apart`."""
    return torch.stack(tensor.chunk(2, 1), 2).flatten(1, 2)


def rules(s: Settings, model: Model) -> Iterator[Rule]:
    """What each tensor is in theirs."""
    yield from _layers.ends(s, "model.embed_tokens", "model.norm")
    yield from _layers.norms(model, "input_layernorm", "post_attention_layernorm")
    for mixer, ffn, theirs in _layers.pairs(model):
        yield from alike(model, f"{mixer}.block", f"{theirs}.self_attn")
        yield from alike(model, f"{ffn}.block.gate", f"{theirs}.mlp.router")
        ours, experts = f"{ffn}.block.experts", f"{theirs}.mlp.experts"
        # their matrices map from the left
        both = f"{ours}.gate_up_proj", f"{experts}.gate_up_proj"
        yield changed(*both, lambda t: apart(t.mT), lambda t: in_turns(t).mT.contiguous())
        yield changed(f"{both[0]}_bias", f"{both[1]}_bias", apart, in_turns)
        yield changed(f"{ours}.down_proj", f"{experts}.down_proj", lambda t: t.mT, lambda t: t.mT.contiguous())
        yield same(f"{ours}.down_proj_bias", f"{experts}.down_proj_bias")
