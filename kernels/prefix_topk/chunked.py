"""The best of a growing set is the best of (the best so far, the new ones): one stable sort a chunk."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.block_list import sort_ids
from zoo.kernels.pool_blocks.chunked import block_starts

_NONE = float("-inf")


def merge_topk(scores: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best along the last dimension, scores [..., n], ids [..., n] -> [..., k]; earlier wins a tie."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return scores.gather(-1, order), ids.gather(-1, order)


def prefix_topk(scores: Tensor, k: int, chunk_size: int, doc_ids: Tensor | None) -> Tensor:
    """See `zoo.kernels.prefix_topk.prefix_topk`."""
    B, T = scores.shape
    start = block_starts(T, chunk_size, doc_ids, scores)  # [B, N]
    token = (start[..., None] + torch.arange(chunk_size, device=scores.device)).clamp(0, T - 1)
    whole = (start >= 0)[..., None]
    new_scores = torch.where(whole, scores[:, None].expand(-1, start.shape[1], -1).gather(2, token), _NONE)
    new_ids = torch.where(whole, token, -1)
    # does the chunk continue the one of the slot before, in the same document?
    goes_on = torch.zeros_like(whole)
    if start.shape[1] > 1:
        near = (start[:, :-1] >= 0) & (start[:, 1:] - start[:, :-1] == chunk_size)
        if doc_ids is not None:
            near = near & (
                doc_ids.gather(1, start[:, 1:].clamp(min=0)) == doc_ids.gather(1, start[:, :-1].clamp(min=0))
            )
        goes_on[:, 1:, 0] = near
    best = scores.new_full((B, k), _NONE)
    ids = torch.full((B, k), -1, dtype=torch.int64, device=scores.device)
    slots = []
    for s, i, more in zip(new_scores.unbind(1), new_ids.unbind(1), goes_on.unbind(1)):
        best, ids = torch.where(more, best, _NONE), torch.where(more, ids, -1)
        best, ids = merge_topk(torch.cat([best, s], -1), torch.cat([ids, i], -1), k)
        slots.append(ids)
    return sort_ids(torch.stack(slots, 1))
