"""Block-structured linear maps as batched products with the tokens last: so laid out, the transposition of Monarch and
the mixing of BLAST are batched products on views, and only the output is copied."""

from __future__ import annotations

import torch
from torch import Tensor


def block_linear(x: Tensor, right: Tensor, left: Tensor | None = None, mix: Tensor | None = None) -> Tensor:
    """See `zoo.kernels.block_linear`; x: [N, features]."""
    N, (k, _, p) = x.shape[0], right.shape
    y = torch.bmm(right, x.reshape(N, k, p).permute(1, 2, 0))  # [k, q, N]
    if mix is not None:
        mixed = torch.bmm(mix.permute(2, 0, 1), y.transpose(0, 1))  # [r, b, N]: one product per rank
        y = torch.bmm(left, mixed.transpose(0, 1))
    elif left is not None:
        y = y.reshape(left.shape[2], left.shape[0], N).transpose(0, 1)  # [l, r, N]
        return torch.bmm(left, y).permute(2, 1, 0).flatten(1)
    return y.permute(2, 0, 1).flatten(1)
