"""Structured linear maps as batched products: one per block-diagonal factor, and for BLAST's sum over blocks one
product of [rows, b] by [b, a] for each of the r ranks."""

from __future__ import annotations

import torch
from torch import Tensor


def block_linear(x: Tensor, first: Tensor, second: Tensor | None = None, scales: Tensor | None = None) -> Tensor:
    """See `zoo.kernels.block_linear`."""
    z = torch.bmm(x.unflatten(1, first.shape[::2]).transpose(0, 1), first.mT)  # [b, N, c]
    if second is None:
        return z.transpose(0, 1).flatten(1)
    if scales is not None:
        h = torch.bmm(z.permute(2, 1, 0), scales.permute(2, 1, 0))  # [r, N, a]
        return torch.bmm(h.permute(2, 1, 0), second.mT).transpose(0, 1).flatten(1)
    blocks, _, width = second.shape
    z = z.transpose(0, 1).reshape(-1, width, blocks)
    return torch.bmm(z.permute(2, 0, 1), second.mT).permute(1, 2, 0).flatten(1)
