"""DINOv2 (arXiv:2304.07193): a vision transformer with layer scale, alone or below a class head."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from zoo.architectures.model import Model
from zoo.convert.families import _layers, vit
from zoo.convert.rules import Rule, same
from zoo.convert.settings import Settings


def document(s: Settings, name: str = "Dinov2", **vision: Any) -> dict[str, Any]:
    """The configuration; `name` begins the names of the original's classes, `vision` are more options."""
    heads = vit.kind(s, f"{name}Model", f"{name}ForImageClassification").endswith("Classification")
    _layers.idle(s, "apply_layernorm", "out_features", "out_indices", "reshape_hidden_states", "stage_names")
    width = int(s.hidden_size * s.mlp_ratio)
    if s.use_swiglu_ffn:
        s.get("hidden_act")  # of the other form
        ffn = {"swiglu": {"hidden_dim": (int(width * 2 / 3) + 7) // 8 * 8, "bias": True}}
    else:
        ffn = vit.mlp(s, width)
    if heads and vit.classes(s):
        vision |= {"num_classes": vit.classes(s), "pool": "class_mean"}
    vision |= _layers.given(mask_token=(bool(s.get("use_mask_token", True)), False))
    residual: dict[str, Any] = {"scale": float(s.layerscale_value), "learn": "channel"}
    residual |= {"drop_path": [s.drop_path_rate] * 2} if s.drop_path_rate else {}  # the same in all layers
    made = vit.frame(s, ffn, **vision)
    made["define"]["layer"] = [part | {"residual": residual} for part in made["define"]["layer"]]
    return made


def rules(s: Settings, model: Model, body: str = "dinov2.") -> Iterator[Rule]:
    """What each tensor is in theirs; `body` is the place of the model below its head."""
    if vit.kind(s, *s.get("architectures", ["Model"])).endswith("Model"):
        body = ""
    optional = {"mask_token": "mask_token", "register_tokens": "register_tokens"}
    yield from vit.ends(s, body, {k: v for k, v in optional.items() if getattr(model.embed, k) is not None})  # type: ignore[union-attr]
    layers = f"{body}encoder.layer"
    yield from _layers.norms(model, "norm1", "norm2", layers=layers)
    yield from _layers.blocks(model, "attention", "mlp", layers=layers, **({} if s.use_swiglu_ffn else vit.MLP))
    for mixer, ffn, theirs in _layers.pairs(model, layers):
        yield same(f"{mixer}.scale", f"{theirs}.layer_scale1.lambda1")
        yield same(f"{ffn}.scale", f"{theirs}.layer_scale2.lambda1")
