"""Rotary settings of transformers as options of attention."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from zoo.convert.families import _layers
from zoo.convert.settings import Settings

KINDS = ("default", "linear", "llama3", "yarn", "longrope", "dynamic")


def head_dim(s: Settings) -> int:
    """Channels of a head."""
    return s.get("head_dim") or s.hidden_size // s.num_attention_heads


def rope(s: Settings, given: Mapping[str, Any] | None = None, *, partial: bool = False) -> dict[str, Any]:
    """Rotary options of attention; `given` where layers differ in them. `partial`: of the families whose code reads
    partial_rotary_factor; the others rotate every channel whatever it says."""
    _layers.idle(s, "original_max_position_embeddings", "partial_rotary_factor", "rope_theta")  # they are in these:
    parameters = {k: v for k, v in (given or s.rope_parameters).items() if v is not None and k != "type"}
    options: dict[str, Any] = {"rope_base": float(parameters.pop("rope_theta"))}
    kind, width, share = parameters["rope_type"], head_dim(s), parameters.pop("partial_rotary_factor", 1.0)
    if share != 1.0 and partial:
        width = options["rotary_dim"] = int(share * width)
    elif share != 1.0 and kind != "default":
        raise s.refused(f"partial_rotary_factor: {share} with rope_type: {kind!r}", "the original cannot run it")
    match kind:
        case "default":
            pass
        case "linear" | "llama3" | "yarn":
            options["rope_scaling"] = parameters
        case "longrope":
            options["rope_scaling"] = _longrope(s, parameters)
        case "dynamic":
            options["rope_base"] *= _stretch(s, parameters["factor"], width)
        case _:
            raise s.refused(f"rope_type: {kind!r}", f"can be {', '.join(KINDS)}")
    return options


def _longrope(s: Settings, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The factors of one length. The original takes the long ones, for the beginning too, as soon as a text is longer
    than what it was first trained on."""
    ours = s.get("original_max_position_embeddings") or parameters.get("original_max_position_embeddings")
    trained = int(ours or s.max_position_embeddings)
    context = s.context("rope_type: 'longrope'", f"up to {trained} takes the short factors, more the long ones")
    factor = parameters.get("factor") or s.max_position_embeddings / trained
    amplitude = parameters.get("attention_factor")
    if amplitude is None:
        amplitude = math.sqrt(1 + math.log(factor) / math.log(trained)) if factor > 1 else 1.0
    which = "long_factor" if context > trained else "short_factor"
    return {"rope_type": "longrope", "factors": parameters[which], "attention_factor": amplitude}


def _stretch(s: Settings, factor: float, width: int) -> float:
    """What the base is multiplied with for texts of the importer's length: with nothing up to the trained length."""
    trained = s.max_position_embeddings
    context = s.context("rope_type: 'dynamic'", f"up to {trained} leaves the angles as they were trained")
    return (factor * max(context, trained) / trained - (factor - 1)) ** (width / (width - 2))
