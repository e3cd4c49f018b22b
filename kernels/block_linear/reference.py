"""Definition of the block-structured linear maps: loops over blocks, as the equations stand."""

from __future__ import annotations

import torch
from torch import Tensor


def block_linear(x: Tensor, right: Tensor, left: Tensor | None = None, mix: Tensor | None = None) -> Tensor:
    """y = right x; with left, Monarch; with left and mix, BLAST. Shapes as in `zoo.kernels.block_linear`; x: [N, .]."""
    parts = [part @ w.T for part, w in zip(x.chunk(len(right), -1), right.unbind(0), strict=True)]
    if left is None:
        return torch.cat(parts, -1)
    if mix is not None:
        mixed = [sum(s * z for s, z in zip(row.unbind(0), parts, strict=True)) for row in mix.unbind(0)]
        return torch.cat([h @ w.T for h, w in zip(mixed, left.unbind(0), strict=True)], -1)
    t = torch.cat(parts, -1)
    outputs = [t[:, block :: len(left)] @ w.T for block, w in enumerate(left.unbind(0))]
    return torch.stack(outputs, -1).flatten(-2)  # output sigma of block lambda stands at sigma l + lambda
