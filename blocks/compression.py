"""Compressed keys, and the choice of key blocks by the attention that compressed keys receive (NSA, InfLLM-V2).

A compressed key stands for one window of `kernel_size` tokens; windows start every `kernel_stride` tokens of a
document and overlap. A query's attention over the windows that are complete when it comes, added up over the
query heads of a group, ranks the blocks of `block_size` tokens that the group then reads in full.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.contract import positions_from
from zoo.kernels.block_list import BlockList, sort_ids
from zoo.kernels.block_scores import block_scores
from zoo.kernels.pool_blocks.chunked import block_starts
from zoo.kernels.select import select
from zoo.segments import handed_on

SCORES_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class CompressedSelection:
    """Which windows there are and which blocks a query reads: at most `top_k`, among them always its own, the
    `local_blocks` that end with its own and the first `init_blocks` of its document; the rest by rank.

    `pool` "sum": a block's score is the attention to each window times the number of strides that the two share
    (NSA); "max": the largest attention to any window that touches the block (InfLLM-V2).
    """

    kernel_size: int
    kernel_stride: int
    block_size: int
    top_k: int
    init_blocks: int
    local_blocks: int
    pool: Literal["sum", "max"]

    def __post_init__(self):
        size, stride, block = self.kernel_size, self.kernel_stride, self.block_size
        if size % stride or block % stride:
            raise ValueError(f"kernel_stride={stride} must divide kernel_size={size} and block_size={block}")
        if self.top_k < self.init_blocks + self.local_blocks:
            raise ValueError(
                f"top_k={self.top_k} blocks must hold those that are always read: init_blocks={self.init_blocks} "
                f"and {self.local_blocks} local ones; raise top_k"
            )

    def num_slots(self, num_tokens: int) -> int:
        """Slots of a table of the windows of `num_tokens` tokens: one a stride."""
        return -(-num_tokens // self.kernel_stride)

    def num_listed(self, num_keys: int) -> int:
        """Slots of the lists that `select` returns."""
        return min(self.top_k - 1, -(-num_keys // self.block_size)) + 1

    def starts(self, seq_len: int, doc_ids: Tensor | None, like: Tensor) -> Tensor:
        """First token of the window in each slot, int64 [B, num_slots], -1 where there is none."""
        start = block_starts(seq_len, self.kernel_stride, doc_ids, like)
        last = start + self.kernel_size - 1
        complete = (start >= 0) & (last < seq_len)
        if doc_ids is not None:
            complete &= doc_ids.gather(1, last.clamp(0, seq_len - 1)) == doc_ids.gather(1, start.clamp(min=0))
        return torch.where(complete, start, -1)

    def new_slots(self, length: Tensor, new: int) -> Tensor:
        """Slots of the windows that `new` tokens behind `length` [B] earlier ones can complete: int64
        [B, num_slots(new)]. The last may stay incomplete; what is written there is written again later."""
        first = -((self.kernel_size - 1 - length) // self.kernel_stride)
        return first.clamp(min=0)[:, None] + torch.arange(self.num_slots(new), device=length.device)

    def ends(self, length: Tensor, size: int) -> Tensor:
        """Last token of the window in each slot of a cache of `size` tokens, -1 where a row does not have it."""
        end = torch.arange(self.num_slots(size), device=length.device) * self.kernel_stride + self.kernel_size - 1
        return torch.where(end < length[:, None], end, -1)

    def gather(self, x: Tensor, start: Tensor) -> Tensor:
        """Tokens [B, N, kernel_size, ...] of the windows that start at `start` [B, N] in x [B, T, ...]; any
        tokens where a window reaches beyond x."""
        token = start[..., None] + torch.arange(self.kernel_size, device=x.device)
        row = torch.arange(x.shape[0], device=x.device)[:, None, None]
        return x[row, token.clamp(0, x.shape[1] - 1)]

    @torch.no_grad()
    def select(
        self, q: Tensor, keys: Tensor, end: Tensor, index: Tensor, num_keys: int, doc_ids: Tensor | None = None
    ) -> BlockList:
        """The blocks each group of query heads reads, lists [B, Hkv, T, num_listed].

        q: [B, T, Hq, D]; keys: [B, N, Hkv, D], compressed; end [B, N]: last token of each window or -1; index
        [B, T]: order of the queries in their row; num_keys: tokens that blocks are cut from. In packed documents
        blocks are counted from a document's start and named by their first token.
        """
        B, T, Hq, D = q.shape
        N, Hkv = keys.shape[1:3]
        size = self.block_size
        end_ids = None
        if doc_ids is None:
            first = torch.zeros_like(index)
            blocks = (torch.arange(-(-num_keys // size), device=q.device) * size).expand(B, -1)
        else:
            first = index - positions_from(doc_ids, B, T, q.device)
            blocks = block_starts(T, size, doc_ids, q)
            end_ids = doc_ids.gather(1, end.clamp(min=0))
        own = index - (index - first) % size
        slots = blocks.clamp(min=0)[..., None] // self.kernel_stride
        slots = slots + torch.arange(size // self.kernel_stride, device=q.device)
        slots = slots.flatten(1).clamp(max=N - 1)[:, None, None]
        # in parts, so that the table of all scores is never whole
        step = max(1, SCORES_AT_ONCE // max(B * Hq * N, 1))
        lists = []
        for part in (slice(a, a + step) for a in range(0, max(T, 1), step)):
            part_ids = None if doc_ids is None else doc_ids[:, part]
            # a window is seen by its own last token too, hence + 1
            scores = block_scores(
                q[:, part], keys, q_index=index[:, part] + 1, k_index=end, q_doc_ids=part_ids, k_doc_ids=end_ids,
                scale=D**-0.5,
            )  # fmt: skip
            weight = scores.softmax(-1).masked_fill(scores == float("-inf"), 0)  # no window: NaN
            weight = self._pool(weight.unflatten(1, (Hkv, Hq // Hkv)).sum(2), slots)
            start, low, high = blocks[:, None], first[:, part, None], own[:, part, None]
            past = (start >= low) & (start < high)
            forced = (start < low + self.init_blocks * size) | (start > high - self.local_blocks * size)
            best = select(weight, self.top_k - 1, forced=forced[:, None], visible=past[:, None]).idx
            table = blocks[:, None, None].expand(-1, *best.shape[1:3], -1)
            best = torch.where(best >= 0, table.gather(-1, best.clamp(min=0).long()), -1)
            lists.append(torch.cat([best, own[:, None, part, None].expand(-1, Hkv, -1, 1)], -1))
        idx = sort_ids(torch.cat(lists, 2))
        if doc_ids is not None:
            return BlockList(idx, kv_block=size, stride=1)
        return BlockList(idx.div(size, rounding_mode="floor"), kv_block=size)

    def _pool(self, weight: Tensor, slots: Tensor) -> Tensor:
        """Window weights [B, H, T, N] to block scores [B, H, T, blocks]; a block covers the strides `slots`."""
        reach = range(self.kernel_size // self.kernel_stride)  # window c lies over the strides c + reach
        strides = torch.stack([F.pad(weight, (n, 0))[..., : weight.shape[-1]] for n in reach])
        strides = strides.sum(0) if self.pool == "sum" else strides.amax(0)
        covered = strides.gather(-1, slots.expand(*strides.shape[:3], -1))
        covered = covered.unflatten(-1, (-1, self.block_size // self.kernel_stride))
        return covered.sum(-1) if self.pool == "sum" else covered.amax(-1)


def write_slots(table: Tensor, new: Tensor, slots: Tensor, used: int) -> Tensor:
    """Put new [B, C, H, D] into `slots` [B, C] of a table [B, slots, H, D] and return its first `used` slots, in
    grad mode as a copy through which gradients reach `new`."""
    row = torch.arange(new.shape[0], device=new.device)[:, None]
    table.index_put_((row, slots), handed_on(new).to(table.dtype))
    if not torch.is_grad_enabled():
        return table[:, :used].to(new.dtype)
    return table[:, :used].to(new.dtype).index_put((row, slots), new)
