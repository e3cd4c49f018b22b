"""Vision transformer (arXiv:2010.11929) with its class head, and what DINOv2 shares with it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from zoo.architectures.model import Model
from zoo.convert.families import _layers
from zoo.convert.rules import Rule, same
from zoo.convert.settings import Settings

MLP = {"up_proj": "fc1", "down_proj": "fc2"}  # where it has no gate


def kind(s: Settings, *known: str) -> str:
    """The class of the original, one of these."""
    names = s.get("architectures") or [known[0]]
    if names[0] not in known:
        raise s.refused(f"the model {names[0]}", "can be " + " or ".join(known))
    return names[0]


def square(s: Settings, name: str) -> int:
    """A size in pixels, the same in both directions."""
    value = s.get(name)
    sides = set(value) if isinstance(value, list) else {value}
    if len(sides) != 1:
        raise s.refused(f"{name}: {value}", "must be a square")
    return sides.pop()


def mlp(s: Settings, width: int) -> dict[str, Any]:
    """Feed-forward layer with biases."""
    s.expect(hidden_act=tuple(_layers.ACTIVATIONS))
    return {"mlp": {"hidden_dim": width, "activation": _layers.ACTIVATIONS[s.hidden_act], "bias": True}}


def frame(s: Settings, ffn: dict[str, Any], **vision: Any) -> dict[str, Any]:
    """A vision model with layer norms in front of the blocks and at the end."""
    norm = {"layer": {"eps": s.layer_norm_eps}}
    attention = {
        "num_heads": s.num_attention_heads, "causal": False, "rope": False, "bias": s.qkv_bias, "out_bias": True,
    }  # fmt: skip
    sizes = {"image_size": square(s, "image_size"), "patch_size": square(s, "patch_size"), "channels": s.num_channels}
    return {
        "dim": s.hidden_size,
        "architecture": "vision",
        "vision": sizes | vision,
        "norm": norm,
        "final_norm": norm,
        "define": {"layer": [{"attention": attention}, ffn]},
        "trunk": [{"repeat": s.num_hidden_layers, "of": "layer"}],
    }


def classes(s: Settings) -> int:
    """How many the head tells apart."""
    return len(s.get("id2label", {}))


def document(s: Settings) -> dict[str, Any]:
    """The configuration."""
    kind(s, "ViTForImageClassification")
    _layers.idle(s, "encoder_stride", "pooler_act", "pooler_output_size")  # of other heads
    return frame(s, mlp(s, s.intermediate_size), num_classes=classes(s))


def ends(s: Settings, body: str, more: dict[str, str]) -> Iterator[Rule]:
    """Patches, positions, tokens, final norm and head; `more` tokens by name of theirs."""
    place = f"{body}embeddings"
    for part in ("weight", "bias"):
        yield same(f"embed.{part}", f"{place}.patch_embeddings.projection.{part}")
        yield same(f"norm.{part}", f"{body}layernorm.{part}")
        if body and classes(s):
            yield same(f"head.{part}", f"classifier.{part}")
    for ours, theirs in ({"cls_token": "cls_token", "pos_embed": "position_embeddings"} | more).items():
        yield same(f"embed.{ours}", f"{place}.{theirs}")


def rules(s: Settings, model: Model) -> Iterator[Rule]:
    """What each tensor is in theirs."""
    yield from ends(s, "vit.", {})
    yield from _layers.norms(model, "layernorm_before", "layernorm_after", layers="vit.layers")
    yield from _layers.blocks(model, "attention", "mlp", layers="vit.layers", **MLP)
