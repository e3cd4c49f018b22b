"""Llama (arXiv:2302.13971), and the parts that models of its kind share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from zoo.architectures.model import Model
from zoo.convert.rules import Rule, linear, residual_blocks, same
from zoo.convert.settings import Settings


def rope(s: Settings) -> dict[str, Any]:
    """Rotary options of attention."""
    parameters = dict(s.rope_parameters)
    options: dict[str, Any] = {"rope_base": float(parameters.pop("rope_theta"))}
    if (share := parameters.pop("partial_rotary_factor", 1.0)) != 1.0:
        options["rotary_dim"] = int(share * s.head_dim)
    if parameters["rope_type"] not in ("default", "linear", "llama3", "yarn"):
        raise s.refused(f"rope_type: {parameters['rope_type']!r}", "can be default, linear, llama3 or yarn")
    if parameters["rope_type"] != "default":
        options["rope_scaling"] = parameters
    return options


def attention(s: Settings) -> dict[str, Any]:
    """Grouped attention as Llama has it."""
    heads = s.num_attention_heads
    options = {"num_heads": heads, "num_kv_heads": s.get("num_key_value_heads", heads)}
    options["head_dim"] = s.get("head_dim") or s.hidden_size // heads
    if s.get("attention_bias", False):
        options["bias"] = True
    return options | rope(s)


def swiglu(s: Settings) -> dict[str, Any]:
    """Gated feed-forward layer."""
    s.expect(hidden_act=("silu", "swish"))
    return {"hidden_dim": s.intermediate_size} | ({"bias": True} if s.get("mlp_bias", False) else {})


def frame(s: Settings, layer: list[Any]) -> dict[str, Any]:
    """A model of equal layers with RMS norms in front of the blocks."""
    norm = {"rms": {"eps": s.rms_norm_eps}}
    return {
        "dim": s.hidden_size,
        "vocab_size": s.vocab_size,
        "tie_embeddings": bool(s.get("tie_word_embeddings", False)),
        "norm": norm,
        "final_norm": norm,
        "define": {"layer": layer},
        "trunk": [{"repeat": s.num_hidden_layers, "of": "layer"}],
    }


def document(s: Settings) -> dict[str, Any]:
    """The configuration."""
    return frame(s, [{"attention": attention(s)}, {"swiglu": swiglu(s)}])


def ends(s: Settings, head: str = "lm_head") -> Iterator[Rule]:
    """Embedding, final norm, head."""
    yield same("tok_embeddings.weight", "model.embed_tokens.weight")
    yield same("norm.weight", "model.norm.weight")
    if not s.get("tie_word_embeddings", False):
        yield same("lm_head.weight", f"{head}.weight")


def layer_rules(s: Settings, mixer: str, ffn: str, i: int) -> Iterator[Rule]:
    """Norms, attention and feed-forward of layer i, at the residual blocks `mixer` and `ffn`."""
    theirs = f"model.layers.{i}"
    yield same(f"{mixer}.norm.weight", f"{theirs}.input_layernorm.weight")
    yield same(f"{ffn}.norm.weight", f"{theirs}.post_attention_layernorm.weight")
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        yield from linear(f"{mixer}.block.{name}", f"{theirs}.self_attn.{name}", bool(s.get("attention_bias")))
    for name in ("gate_proj", "up_proj", "down_proj"):
        yield from linear(f"{ffn}.block.{name}", f"{theirs}.mlp.{name}", bool(s.get("mlp_bias")))


def rules(s: Settings, model: Model) -> Iterator[Rule]:
    """What each tensor is in theirs."""
    yield from ends(s)
    blocks = residual_blocks(model)
    for i in range(s.num_hidden_layers):
        yield from layer_rules(s, blocks[2 * i], blocks[2 * i + 1], i)
