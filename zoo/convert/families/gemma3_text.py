"""Gemma 3 without images (arXiv:2503.19786): windows with a rotary base of their own between full layers, norms of
factors 1 + w in front of and behind each block, GeGLU, scaled embeddings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from zoo.architectures.model import Model
from zoo.convert.families import _layers, llama
from zoo.convert.rules import Rule
from zoo.convert.settings import Settings


def document(s: Settings) -> dict[str, Any]:
    """The configuration."""
    s.expect(
        hidden_activation="gelu_pytorch_tanh", use_bidirectional_attention=(False, None),
        attn_logit_softcapping=None,  # theirs has the setting and does not use it
    )  # fmt: skip
    # layer_types says what these once said
    _layers.idle(s, "_sliding_window_pattern", "sliding_window_pattern", "rope_local_base_freq", "cache_implementation")
    more = {
        "scale": s.query_pre_attn_scalar**-0.5, "qk_norm": "head", "norm_eps": s.rms_norm_eps,
        "norm_zero_centered": True,
    }  # fmt: skip
    layers = []
    for window in llama.windows(s):
        kind = "full" if window is None else "sliding"
        attention = llama.attention(s, window, s.rope_parameters[f"{kind}_attention"], **more)
        layers.append((kind, [{"attention": attention}, {"geglu": {"hidden_dim": s.intermediate_size}}]))
    norm = {"rms": {"eps": s.rms_norm_eps, "zero_centered": True}}
    made = llama.stack(s, layers) | {"norm": norm, "final_norm": norm, "residual": "sandwich"}
    made["embedding_scale"] = s.hidden_size**0.5
    if s.get("final_logit_softcapping"):
        made["logit_cap"] = float(s.final_logit_softcapping)
    return made


def rules(s: Settings, model: Model) -> Iterator[Rule]:
    """What each tensor is in theirs."""
    yield from _layers.ends(s, "model.embed_tokens", "model.norm")
    yield from _layers.norms(model, "input_layernorm", "pre_feedforward_layernorm")
    yield from _layers.norms(model, "post_attention_layernorm", "post_feedforward_layernorm", ours="out_norm")
    yield from _layers.blocks(model, "self_attn", "mlp")
