"""Definition of rotary embedding: each pair of channels is a complex number that turns by position * frequency."""

from __future__ import annotations

import torch
from torch import Tensor


def rope(
    x: Tensor, positions: Tensor, frequencies: Tensor, amplitude: float, interleaved: bool, inverse: bool
) -> Tensor:
    """z_i <- a z_i exp(i p w_i); with `inverse` z_i <- z_i exp(-i p w_i) / a."""
    half = frequencies.shape[0]
    wide = x.to(torch.float64)
    out = list(wide.unbind(-1))
    for i, w in enumerate(frequencies.detach().unbind()):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
        angle = positions.to(torch.float64)[..., None] * w * (-1 if inverse else 1)
        factor = 1 / amplitude if inverse else amplitude
        cos, sin = factor * angle.cos(), factor * angle.sin()
        out[a], out[b] = wide[..., a] * cos - wide[..., b] * sin, wide[..., a] * sin + wide[..., b] * cos
    return torch.stack(out, -1).to(x.dtype)
