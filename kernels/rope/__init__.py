"""Rotary position embedding at explicit positions. Su et al. 2021, arXiv:2104.09864."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from zoo.kernels import native as native_core
from zoo.kernels.dispatch import call, register_row
from zoo.kernels.rope import chunked, native, reference
from zoo.kernels.rope.frequencies import check_scaling, rope_frequencies, yarn_mscale

register_row(
    "rope", "native", native.rope, priority=20, devices=("cpu",), dtypes=(torch.float32, torch.float64),
    missing=functools.partial(native_core.missing, "rope"), refuse=native.refuse,
)  # fmt: skip
register_row("rope", "chunked", chunked.rope, priority=10)
register_row("rope", "reference", reference.rope, priority=0)


def rope(
    x: Tensor,
    positions: Tensor,
    *,
    base: float = 10000.0,
    rotary_dim: int | None = None,
    interleaved: bool = False,
    inverse: bool = False,
    scaling: Mapping[str, Any] | None = None,
    backend: str = "auto",
) -> Tensor:
    """Rotate pairs of channels of x by positions * base^(-2i / rotary_dim).

    x: [B, T, H, D]; positions: [B, T] integer. The first `rotary_dim` channels (default D) are rotated and the
    rest pass. Pairs are (i, i + rotary_dim/2), or (2i, 2i+1) with `interleaved`. `inverse` undoes the
    rotation. `scaling`: see `rope_frequencies`. Angles are fp32, fp64 where x is. Returns x's shape and dtype.
    """
    rotary_dim = x.shape[-1] if rotary_dim is None else rotary_dim
    if rotary_dim % 2 or not 0 <= rotary_dim <= x.shape[-1]:
        raise ValueError(f"rotary_dim must be even and at most the head dim {x.shape[-1]}, got {rotary_dim}")
    if rotary_dim == 0:
        return x
    if x.is_cpu and native_core.watched(x) is None:
        frequencies, amplitude = _kept_frequencies(rotary_dim, base, _hashable(scaling))
    else:
        frequencies, amplitude = rope_frequencies(rotary_dim, base, scaling, x.device)
    return call("rope", backend, x, positions, frequencies, amplitude, interleaved, inverse)


def _hashable(scaling: Mapping[str, Any] | None) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted((key, tuple(v) if isinstance(v, list) else v) for key, v in (scaling or {}).items()))


@functools.lru_cache(maxsize=64)
def _kept_frequencies(rotary_dim: int, base: float, scaling: tuple[tuple[str, Any], ...]):
    return rope_frequencies(rotary_dim, base, dict(scaling) or None)


__all__ = ["check_scaling", "rope", "rope_frequencies", "yarn_mscale"]
