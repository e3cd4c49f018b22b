"""Frequencies of rotary embedding and their rescalings for longer contexts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_KEYS = {
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {
        "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor", "mscale",
        "mscale_all_dim", "truncate",
    },
    "longrope": {"factors", "attention_factor"},
}  # fmt: skip
_REQUIRED = {
    "linear": {"factor"},
    "llama3": _KEYS["llama3"],
    "yarn": {"factor", "original_max_position_embeddings"},
    "longrope": {"factors"},
}


def check_scaling(scaling: Mapping[str, Any] | None, rotary_dim: int) -> None:
    """Raise ValueError where `scaling` has an unknown type, an unknown key or lacks one, or where its factors are not
    those of `rotary_dim` channels."""
    if scaling is None:
        return
    kind, keys = scaling.get("rope_type"), set(scaling) - {"rope_type"}
    if kind not in _KEYS:
        raise ValueError(f"rope scaling needs rope_type, one of {', '.join(_KEYS)}; got {kind!r}")
    if unknown := keys - _KEYS[kind]:
        raise ValueError(
            f"rope scaling {kind} has no {', '.join(sorted(unknown))}; it takes {', '.join(sorted(_KEYS[kind]))}"
        )
    if lacking := _REQUIRED[kind] - keys:
        raise ValueError(f"rope scaling {kind} needs {', '.join(sorted(lacking))}")
    if kind == "longrope":
        factors = scaling["factors"]
        if not isinstance(factors, (list, tuple)) or len(factors) != rotary_dim // 2:
            raise ValueError(f"rope scaling longrope needs {rotary_dim // 2} factors, one a pair; got {factors}")


def rope_frequencies(
    rotary_dim: int, base: float, scaling: Mapping[str, Any] | None = None, device: torch.device | None = None
) -> tuple[Tensor, float]:
    """Frequencies [rotary_dim / 2] in fp64 and the factor by which cos and sin are multiplied.

    `scaling` names its method in `rope_type`, with the keys Hugging Face uses: `linear` (factor), `llama3`
    (factor, low_freq_factor, high_freq_factor, original_max_position_embeddings), `yarn` (factor,
    original_max_position_embeddings, beta_fast=32, beta_slow=1, attention_factor, mscale, mscale_all_dim,
    truncate=True; arXiv:2309.00071) or `longrope` (factors, one for each pair of channels, attention_factor=1;
    arXiv:2402.13753). Hugging Face has two lists of factors for longrope and chooses by the length of the text, so
    that an angle depends on tokens behind it; here it is one.
    """
    exponent = torch.arange(0, rotary_dim, 2, dtype=torch.float64, device=device) / rotary_dim
    plain = float(base) ** -exponent
    check_scaling(scaling, rotary_dim)
    if scaling is None:
        return plain, 1.0
    if scaling["rope_type"] == "longrope":
        factors = torch.tensor(scaling["factors"], dtype=torch.float64, device=device)
        return plain / factors, float(scaling.get("attention_factor", 1.0))
    factor = float(scaling["factor"])
    if scaling["rope_type"] == "linear":
        return plain / factor, 1.0
    length = float(scaling["original_max_position_embeddings"])
    if scaling["rope_type"] == "llama3":
        low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
        turns = length * plain / (2 * math.pi)  # full turns inside the original context
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return plain * (keep + (1 - keep) / factor), 1.0

    def channel(turns: float) -> float:  # the pair that makes this many turns in the original context
        return rotary_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))

    first, last = channel(float(scaling.get("beta_fast", 32))), channel(float(scaling.get("beta_slow", 1)))
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotary_dim - 1)
    pair = torch.arange(rotary_dim // 2, dtype=torch.float64, device=device)
    slow = ((pair - first) / max(last - first, 1e-3)).clamp(0, 1)
    return plain * (1 - slow) + plain / factor * slow, _yarn_amplitude(scaling, factor)


def _yarn_amplitude(scaling: Mapping[str, Any], factor: float) -> float:
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    scale, all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if scale and all_dim:
        return yarn_mscale(factor, float(scale)) / yarn_mscale(factor, float(all_dim))
    return yarn_mscale(factor)


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """YaRN's temperature: 0.1 * mscale * ln(factor) + 1 for a factor above 1."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
