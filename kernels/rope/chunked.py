"""Rotary embedding in vectorised torch."""

from __future__ import annotations

import torch
from torch import Tensor


def rope(
    x: Tensor, positions: Tensor, frequencies: Tensor, amplitude: float, interleaved: bool, inverse: bool
) -> Tensor:
    """See `zoo.kernels.rope.rope`."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    angle = positions.to(wide)[..., None] * frequencies.detach().to(wide)
    factor = 1 / amplitude if inverse else amplitude
    cos = (angle.cos() * factor)[:, :, None]  # one angle for all heads
    sin = (angle.sin() * (-factor if inverse else factor))[:, :, None]
    half = frequencies.shape[0]
    turned, rest = x[..., : 2 * half].to(wide), x[..., 2 * half :]
    if interleaved:
        a, b = turned.unflatten(-1, (half, 2)).unbind(-1)
        out = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    else:
        a, b = turned.chunk(2, -1)
        out = torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
    return out.to(x.dtype) if rest.shape[-1] == 0 else torch.cat([out.to(x.dtype), rest], -1)
