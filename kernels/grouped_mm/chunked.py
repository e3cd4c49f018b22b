"""Grouped matrix product as one batched product over blocks of rows: plain torch, shapes free of the counts.

Each group's rows are padded up to whole blocks of 64. Whatever the counts are, there are at most
(N + 63 E) / 64 blocks, each with one weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 64


def num_blocks(rows: int, groups: int) -> int:
    """Most blocks that `rows` rows in `groups` groups can need."""
    return (rows + groups * (BLOCK - 1)) // BLOCK


def grouped_mm(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """See `zoo.kernels.grouped_mm.grouped_mm`."""
    N, K = x.shape
    E, _, M = weight.shape
    blocks = num_blocks(N, E)
    row_end, block_end = counts.cumsum(0), ((counts + BLOCK - 1) // BLOCK).cumsum(0)
    row = torch.arange(N, device=x.device)
    group = torch.searchsorted(row_end, row, right=True)
    first_row, first_block = row_end - counts, block_end - (counts + BLOCK - 1) // BLOCK
    place = first_block[group] * BLOCK + row - first_row[group]
    block_group = torch.searchsorted(block_end, torch.arange(blocks, device=x.device), right=True).clamp(max=E - 1)
    padded = x.new_zeros(blocks * BLOCK, K).index_copy(0, place, x)
    y = torch.bmm(padded.view(blocks, BLOCK, K), weight.index_select(0, block_group))
    return y.view(-1, M).index_select(0, place)
