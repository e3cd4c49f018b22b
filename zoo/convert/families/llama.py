"""Llama (arXiv:2302.13971), and the parts that models of its kind share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from zoo.architectures.model import Model
from zoo.convert.families import _layers
from zoo.convert.families._rope import head_dim, rope
from zoo.convert.rules import Rule
from zoo.convert.settings import Settings


def attention(
    s: Settings,
    window: int | None = None,
    given_rope: Mapping[str, Any] | None = None,
    *,
    partial: bool = False,
    **more: Any,
) -> dict[str, Any]:
    """Grouped attention as Llama has it, with a window, and `more` options; `partial` as in `rope`."""
    heads = s.num_attention_heads
    options = {"num_heads": heads, "num_kv_heads": s.get("num_key_value_heads", heads), "head_dim": head_dim(s)}
    options |= _layers.given(bias=(bool(s.get("attention_bias", False)), False), window=(window, None))
    return options | rope(s, given_rope, partial=partial) | more


def swiglu(s: Settings) -> dict[str, Any]:
    """Gated feed-forward layer."""
    s.expect(hidden_act=("silu", "swish"))
    return {"hidden_dim": s.intermediate_size} | _layers.given(bias=(bool(s.get("mlp_bias", False)), False))


def one_window(s: Settings) -> list[int | None]:
    """The window of each layer where all have the same."""
    return [s.get("sliding_window")] * s.num_hidden_layers


def windows(s: Settings) -> list[int | None]:
    """The window of each layer where `layer_types` tells which ones have it."""
    _layers.idle(s, "use_sliding_window")
    kinds = s.get("layer_types") or ["full_attention"] * s.num_hidden_layers
    if odd := sorted(set(kinds) - {"full_attention", "sliding_attention"}):
        raise s.refused(f"layer_types: {odd[0]!r}", "can be full_attention or sliding_attention")
    window = s.get("sliding_window")
    return [window if kind == "sliding_attention" else None for kind in kinds[: s.num_hidden_layers]]


def stack(s: Settings, layers: list[tuple[str, list[Any]]]) -> dict[str, Any]:
    """A model of these layers, each with its name; those of one name are equal."""
    if len({name for name, _ in layers}) == 1:
        layers = [("layer", parts) for _, parts in layers]
    return _layers.body(s, s.rms_norm_eps, dict(layers), [name for name, _ in layers])


def by_window(s: Settings, windows: list[int | None], ffn: Any, **more: Any) -> dict[str, Any]:
    """A model of layers of attention with `more` options and `ffn`, which differ in the window alone."""
    named = [("full" if w is None else "sliding", [{"attention": attention(s, w, **more)}, ffn]) for w in windows]
    return stack(s, named)


def document(s: Settings) -> dict[str, Any]:
    """The configuration."""
    s.expect(rope_interleaved=False)  # stands in published files; the original does not read it
    return by_window(s, [None] * s.num_hidden_layers, {"swiglu": swiglu(s)})


def rules(s: Settings, model: Model) -> Iterator[Rule]:
    """What each tensor is in theirs."""
    yield from _layers.ends(s, "model.embed_tokens", "model.norm")
    yield from _layers.norms(model, "input_layernorm", "post_attention_layernorm")
    yield from _layers.blocks(model, "self_attn", "mlp")
