"""Means of finished chunks, for blocks whose chunk c depends on the chunks before it.

Chunks have `chunk_size` tokens and restart with each document. Only a finished chunk has a mean, so at most
T / chunk_size of them end inside a call, whatever the documents are: every shape here is static.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class FinishedChunks:
    """means: [B, J, D] of the chunks that end in this call, row by row in order, then zeros; before: [B, T] int64,
    how many of them end before a token; total: [B] int64, how many there are; first: [B, J] bool, whether the
    chunk is the first of its document; rest: [B, D], sum over the unfinished chunk at the end of a stream."""

    means: Tensor
    before: Tensor
    total: Tensor
    first: Tensor
    rest: Tensor


def max_finished(seq_len: int, chunk_size: int, streaming: bool) -> int:
    """Most chunks that can end inside a call of `seq_len` tokens."""
    return (seq_len + (chunk_size - 1 if streaming else 0)) // chunk_size


def max_read(seq_len: int, chunk_size: int, streaming: bool) -> int:
    """Most chunks that can end before the last token of such a call."""
    return max_finished(seq_len - 1, chunk_size, streaming)


def finished_chunks(
    x: Tensor, position: Tensor, chunk_size: int, doc_ids: Tensor | None = None, carry: Tensor | None = None
) -> FinishedChunks:
    """Chunks of x [B, T, D] at `position` [B, T] of its document; `carry` [B, D] is the sum over the tokens of
    the current chunk that came in earlier calls (zeros where the stream stands at a chunk's start)."""
    B, T, D = x.shape
    J = max_finished(T, chunk_size, carry is not None)
    offset = position % chunk_size
    end = offset == chunk_size - 1
    ends = end.long().cumsum(1)
    before = ends - end.long()
    last = torch.arange(T, device=x.device) + chunk_size - 1 - offset  # where the token's chunk would end
    finishes = last < T
    if doc_ids is not None:
        finishes = finishes & (doc_ids.gather(1, last.clamp(max=T - 1)) == doc_ids)
    bin_ = torch.where(finishes, before, J)
    wide = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    sums = wide.new_zeros(B, J + 1, D).scatter_add(1, bin_[..., None].expand(B, T, D), wide)
    if carry is not None:
        sums = sums.scatter_add(1, bin_[:, :1, None].expand(B, 1, D), carry[:, None].to(wide.dtype))
    first = torch.zeros(B, J + 1, dtype=torch.bool, device=x.device)
    first = first.scatter(1, torch.where(position == chunk_size - 1, before, J), True)
    return FinishedChunks(sums[:, :J] / chunk_size, before, ends[:, -1], first[:, :J], sums[:, J])
