"""RecurrentGemma (arXiv:2404.07839): Griffin's recurrent layers and local attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from zoo.architectures.model import Model
from zoo.convert.families import _layers, llama
from zoo.convert.rules import Rule
from zoo.convert.settings import Settings


def _kinds(s: Settings) -> list[str]:
    return [s.block_types[i % len(s.block_types)] for i in range(s.num_hidden_layers)]


def document(s: Settings) -> dict[str, Any]:
    """The configuration."""
    s.expect(hidden_activation="gelu_pytorch_tanh", embeddings_scale_by_sqrt_dim=True)
    if s.rope_parameters["rope_type"] != "default":
        raise s.refused(f"rope_type: {s.rope_parameters['rope_type']!r}", "can be default")
    _layers.idle(s, "w_init_variance_scale", "final_w_init_variance_scale", "partial_rotary_factor", "_block_types")
    attention = llama.attention(s, partial=True) | {"window": s.attention_window_size, "out_bias": True}
    recurrent = {"lru_width": s.lru_width, "num_heads": s.num_attention_heads, "conv_size": s.conv1d_width}
    define = {
        "mlp_": {"geglu": {"hidden_dim": s.intermediate_size // 2, "bias": True}},
        "recurrent": [{"rg_lru": recurrent}, "mlp_"],
        "local": [{"attention": attention}, "mlp_"],
    }
    layers = ["recurrent" if kind == "recurrent" else "local" for kind in _kinds(s)]
    made = _layers.body(s, s.rms_norm_eps, define, layers, zero_centered=True)
    # the original holds the factor in bfloat16, whatever the dtype of the model
    scale = torch.tensor(s.hidden_size**0.5, dtype=torch.bfloat16).item()
    return made | {"embedding_scale": scale, "logit_cap": s.logits_soft_cap}


def rules(s: Settings, model: Model) -> Iterator[Rule]:
    """What each tensor is in theirs."""
    yield from _layers.ends(s, "model.embed_tokens", "model.final_norm")
    yield from _layers.norms(model, "temporal_pre_norm", "channel_pre_norm")
    yield from _layers.blocks(model, "temporal_block", "mlp_block")
