"""Rates that explain measured times: least squares over relative errors, no rate below zero."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

_ROUNDS = 4  # of making outliers count less
_CERTAIN = 0.03  # relative errors below are noise


def rates(
    features: Sequence[Sequence[float]], seconds: Sequence[float], least: Sequence[float] = ()
) -> tuple[float, ...]:
    """r >= `least` (0 where none is given) that makes sum |features r / seconds - 1| small. Features that are always 0
    get the least."""
    relative = torch.tensor(features, dtype=torch.float64) / torch.tensor(seconds, dtype=torch.float64)[:, None]
    floor = torch.tensor([*least] or [0.0] * relative.shape[1], dtype=torch.float64)
    wanted = 1 - relative @ floor
    # columns of one size, so that none is lost in rounding
    sizes = relative.abs().amax(0)
    columns = [i for i, size in enumerate(sizes.tolist()) if size > 0]
    scaled = relative[:, columns] / sizes[columns]
    weights, found = torch.ones(len(seconds), dtype=torch.float64), torch.zeros(len(columns), dtype=torch.float64)
    for _ in range(_ROUNDS):
        found = _nonnegative(scaled * weights[:, None], wanted * weights)
        weights = (scaled @ found - wanted).abs().clamp(min=_CERTAIN).rsqrt()
    floor[columns] += found / sizes[columns]
    return tuple(floor.tolist())


def _nonnegative(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The x >= 0 of least |a x - b|: the best of the solutions on each set of columns, of which there are few."""
    best, least = torch.zeros(a.shape[1], dtype=a.dtype), float(b.norm())
    for count in range(1, a.shape[1] + 1):
        for chosen in itertools.combinations(range(a.shape[1]), count):
            part = a[:, list(chosen)]
            x = torch.linalg.lstsq(part, b[:, None], driver="gelsd").solution[:, 0]
            error = float((part @ x - b).norm())
            if bool((x >= 0).all()) and error < least:
                best, least = torch.zeros_like(best), error
                best[list(chosen)] = x
    return best
