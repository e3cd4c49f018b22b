"""Definition of block pooling: a loop over rows and tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def pool_blocks(x: Tensor, block_size: int, mode: str, doc_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `zoo.kernels.pool_blocks.pool_blocks`."""
    B, T, H, D = x.shape
    wide = x if x.dtype == torch.float64 else x.float()
    slots = -(-T // block_size)
    rows, starts = [], []
    for b in range(B):
        pooled, start = [wide.new_zeros(H, D)] * slots, [-1] * slots
        first = 0  # where the open block started
        for t in range(T):
            if doc_ids is not None and doc_ids[b, t] != doc_ids[b, first]:
                first = t
            if t + 1 - first == block_size:
                block = wide[b, first : t + 1]
                start[first // block_size] = first
                pooled[first // block_size] = {"mean": block.mean(0), "max": block.amax(0), "min": block.amin(0)}[mode]
                first = t + 1
                if first == T:
                    break
        rows.append(torch.stack(pooled))
        starts.append(start)
    return torch.stack(rows), torch.tensor(starts, dtype=torch.int64, device=x.device)
