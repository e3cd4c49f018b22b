"""LFM2 (arXiv:2511.23404): gated short convolutions and a few layers of attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from zoo.architectures.model import Model
from zoo.convert.families import _layers, llama
from zoo.convert.rules import Rule
from zoo.convert.settings import Settings


def _width(s: Settings) -> int:
    """Hidden width of the feed-forward layers."""
    width = s.intermediate_size
    factor, multiple = s.get("block_ffn_dim_multiplier"), s.block_multiple_of
    if s.block_auto_adjust_ff_dim:
        width = int(2 * width / 3)
        if factor is not None:
            width = -(-int(factor * width) // multiple) * multiple
    return width


def document(s: Settings) -> dict[str, Any]:
    """The configuration."""
    _layers.idle(s, "full_attn_idxs", "num_hidden_layers", *UNUSED)
    attention = llama.attention(s) | {"qk_norm": "head", "norm_eps": s.norm_eps}
    define = {
        "conv": {"gated_conv": {"conv_size": s.conv_L_cache, "bias": s.conv_bias}},
        "full": {"attention": attention},
        "dense": {"swiglu": {"hidden_dim": _width(s)}},
        "c": ["conv", "dense"],
        "a": ["full", "dense"],
    }
    return _layers.body(s, s.norm_eps, define, ["c" if kind == "conv" else "a" for kind in s.layer_types])


# stand in published configurations; the original does not read them
UNUSED = (
    "block_dim", "block_mlp_init_scale", "block_norm_eps", "block_out_init_scale", "block_use_swiglu",
    "block_use_xavier_init", "conv_dim", "conv_dim_out", "conv_use_xavier_init", "num_heads", "use_pos_enc",
)  # fmt: skip


def rules(s: Settings, model: Model) -> Iterator[Rule]:
    """What each tensor is in theirs."""
    yield from _layers.ends(s, "model.embed_tokens", "model.embedding_norm")
    yield from _layers.norms(model, "operator_norm", "ffn_norm")
    mixers = ["conv" if kind == "conv" else "self_attn" for kind in s.layer_types]
    renamed = {"o_proj": "out_proj", "q_norm": "q_layernorm", "k_norm": "k_layernorm"}
    renamed |= {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    yield from _layers.blocks(model, mixers, "feed_forward", **renamed)
