"""Block pooling by one gather. Two blocks of the same size never start in the same window of that size, so a
table with one slot per window holds them all, whatever the documents."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def block_starts(seq_len: int, block_size: int, doc_ids: Tensor | None, like: Tensor) -> Tensor:
    """Start int64 [B, ceil(T / block_size)] of the complete block in each slot, -1 where there is none."""
    slots = -(-seq_len // block_size)
    if doc_ids is None:
        start = torch.arange(slots, device=like.device) * block_size
        return torch.where(start + block_size <= seq_len, start, -1).expand(like.shape[0], slots)
    index = torch.arange(seq_len, device=like.device)
    new = F.pad(doc_ids[:, 1:] != doc_ids[:, :-1], (1, 0), value=True)
    position = index - torch.where(new, index, 0).cummax(1).values
    reach = min(block_size - 1, seq_len)
    same = F.pad(doc_ids[:, reach:] == doc_ids[:, : seq_len - reach], (0, reach), value=False)
    opens = same & (position % block_size == 0)
    opens = F.pad(opens, (0, slots * block_size - seq_len), value=False).unflatten(1, (slots, block_size))
    offset = torch.arange(block_size, device=like.device)
    start = torch.where(opens, offset, -1).amax(-1)
    return torch.where(start >= 0, start + torch.arange(slots, device=like.device) * block_size, -1)


def pool_blocks(x: Tensor, block_size: int, mode: str, doc_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `zoo.kernels.pool_blocks.pool_blocks`."""
    B, T = x.shape[:2]
    start = block_starts(T, block_size, doc_ids, x)
    slots = start.shape[1]
    if doc_ids is None:
        blocks = F.pad(x, (0, 0, 0, 0, 0, slots * block_size - T)).unflatten(1, (slots, block_size))
    else:
        token = (start[..., None] + torch.arange(block_size, device=x.device)).clamp(0, T - 1)
        row = torch.arange(B, device=x.device)[:, None, None]
        blocks = x[row, token]  # [B, slots, block_size, H, D]
    blocks = blocks if x.dtype == torch.float64 else blocks.float()
    pooled = {"mean": blocks.mean, "max": blocks.amax, "min": blocks.amin}[mode](2)
    return torch.where((start >= 0)[..., None, None], pooled, 0), start
