"""MiniMax-Text-01 (arXiv:2501.08313): lightning and softmax attention, experts; blocks add to the normed stream."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from zoo.architectures.model import Model
from zoo.convert.families import _layers, llama
from zoo.convert.rules import Rule, alike
from zoo.convert.settings import Settings
from zoo.errors import ConfigError

# stand in published configurations; the original does not read them
UNUSED = ("attn_type_list", "postnorm", "rope_theta", "rotary_dim", "shared_intermediate_size", "shared_moe_mode")


def document(s: Settings) -> dict[str, Any]:
    """The configuration."""
    s.expect(hidden_act=("silu", "swish"))
    _layers.idle(s, "block_size", "num_hidden_layers", *UNUSED)
    heads = s.num_attention_heads
    if heads & (heads - 1) and "linear_attention" in s.layer_types:
        raise s.refused(f"num_attention_heads: {heads}", "decays of lightning attention are those of a power of two")
    attention = llama.attention(s) | _layers.given(window=(s.get("sliding_window"), None))
    moe = {
        "num_experts": s.num_local_experts, "top_k": s.num_experts_per_tok, "hidden_dim": s.intermediate_size,
        "aux_coef": s.router_aux_loss_coef,
    }  # fmt: skip

    def added(block: dict[str, Any], skip: float, scale: float) -> list[Any]:
        return [block | {"residual": {"style": "normed", "skip": float(skip), "scale": float(scale)}}]

    lightning = {"lightning": {"num_heads": heads, "head_dim": attention["head_dim"]}}
    define = {
        "linear": added(lightning, s.linear_attn_alpha_factor, s.linear_attn_beta_factor),
        "full": added({"attention": attention}, s.full_attn_alpha_factor, s.full_attn_beta_factor),
        "experts": added({"moe": moe}, s.mlp_alpha_factor, s.mlp_beta_factor),
        "l": ["linear", "experts"],
        "f": ["full", "experts"],
    }
    layers = ["l" if kind == "linear_attention" else "f" for kind in s.layer_types]
    return _layers.body(s, s.rms_norm_eps, define, layers)


def rules(s: Settings, model: Model) -> Iterator[Rule]:
    """What each tensor is in theirs."""
    yield from _layers.ends(s, "model.embed_tokens", "model.norm")
    yield from _layers.norms(model, "input_layernorm", "post_attention_layernorm")
    for i, (mixer, ffn, theirs) in enumerate(_layers.pairs(model)):
        yield from alike(model, f"{ffn}.block", f"{theirs}.mlp")
        for rule in alike(model, f"{mixer}.block", f"{theirs}.self_attn"):
            decays = s.layer_types[i] == "linear_attention" and rule.ours[0].endswith(".norm.weight")
            yield _with_decays(rule, s, i) if decays else rule


DECAYS = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")


def _decays(s: Settings, layer: int) -> dict[str, Tensor]:
    """Tensors that the original stores though its configuration says them, by name; in its own order of steps, so that
    they are equal to the last bit."""
    rate = (1 / 2 ** (8 / s.num_attention_heads)) ** (torch.arange(s.num_attention_heads) + 1)
    rate = (rate * (1 - layer / (s.num_hidden_layers - 1 + 1e-5) + 1e-5))[:, None, None]
    steps = torch.arange(s.block_size) + 1
    apart = rate * (steps[:, None] - steps)[None, None]
    return {
        "slope_rate": rate,
        "query_decay": torch.exp(-rate * steps[:, None]),
        "key_decay": torch.exp(-rate * (s.block_size - steps[:, None])),
        "diagonal_decay": torch.exp(torch.where(apart >= 0, -apart, float("-inf"))),
    }


def _with_decays(rule: Rule, s: Settings, layer: int) -> Rule:
    """The rule of a layer's norm that also checks the stored decays, and gives them back in the norm's dtype."""
    place = rule.theirs[0].removesuffix("norm.weight")

    def there(tensors: list[Tensor]) -> list[Tensor]:
        for (name, wanted), tensor in zip(_decays(s, layer).items(), tensors[1:], strict=True):
            if tensor.shape != wanted.shape or not torch.equal(tensor.cpu(), wanted.to(tensor.dtype)):
                raise ConfigError(f"{place}{name} is not the one that the configuration says")
        return tensors[:1]

    def back(tensors: list[Tensor]) -> list[Tensor]:
        return [tensors[0], *(t.to(tensors[0]) for t in _decays(s, layer).values())]

    return Rule(rule.ours, (*rule.theirs, *(place + name for name in DECAYS)), there, back)
