"""Quest: each query reads the pages of keys that could hold its largest scores. Tang et al. 2024, arXiv:2406.10774.

u_p  = sum_d max(q_d max_{j in p} k_jd, q_d min_{j in p} k_jd)  >=  q . k_j for every key j of page p
S(t) = {own page} + the top_k - 1 pages before it with the largest u_p
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.blocks.selection import KeyBlocks, Part, Policy, SelectState
from zoo.kernels import select_blocks as selecting
from zoo.kernels.block_list import BlockList
from zoo.kernels.select_blocks import select_blocks
from zoo.registry import register
from zoo.schema import PositiveInt


def bounds(keys: Tensor, dim: int) -> Tensor:
    """Largest and smallest number of each channel along `dim`, side by side in the last dimension."""
    return torch.cat([keys.amax(dim), keys.amin(dim)], -1)


def bound_queries(q: Tensor) -> Tensor:
    """Queries whose product with `bounds` is the largest score that keys inside the bounds can have."""
    return torch.cat([q.clamp(min=0), q.clamp(max=0)], -1)


@register(
    "quest",
    kind="select",
    paper="arXiv:2406.10774",
    ops=("sparse_attention", "select_blocks"),
    state_growth="linear",
    relations=("attention(select={'quest': {'block_size': 8, 'top_k': 99}}) == attention()",),
    examples=({"block_size": 8, "top_k": 3},),
)
class Quest(Policy):
    """Each query head reads its own page and the top_k - 1 earlier ones with the largest upper bound of a score.

    A page keeps the largest and the smallest value of each channel of its block_size (rotated) keys; the bound is
    reached where one key has them all. The paper selects in decoding alone; here every token is selected for as if it
    were decoded, so that prefill and decoding agree. State: 2 / block_size of the cache. 2 T^2 / block_size work for
    bounds, T top_k block_size for attention. top_k of all pages is attention.
    Useful: 4 d FLOPs for each key of the pages that a query head reads, and 4 d for the bound of each page before
    it.
    """

    def __init__(self, *, block_size: PositiveInt = 16, top_k: PositiveInt = 128):
        self.block_size, self.top_k = block_size, top_k

    @property
    def expectation(self) -> str:
        return f"quest: a query head reads {self.top_k} pages of {self.block_size} keys, no two of a call the same"

    def prepare(self, whole: Part, k: Tensor, state: SelectState | None) -> tuple[KeyBlocks, Tensor]:
        return self.block_table(whole, k, self.block_size, state, lambda keys: bounds(keys, 2))

    def blocks(self, part: Part, prepared: tuple[KeyBlocks, Tensor]) -> BlockList:
        pages, table = prepared
        best = select_blocks(bound_queries(part.new(part.q)), table, self.top_k - 1, **pages.masks(part))
        return pages.lists(best.idx, part)

    def table_shape(self, num_keys: int) -> tuple[int, ...]:
        return (-(-num_keys // self.block_size), self.num_kv_heads, 2 * self.head_dim)

    def scoring_flops(self, batch_size: int, num_queries: int, num_new: int, num_keys: int) -> int:
        pages = -(-num_keys // self.block_size)
        return selecting.flops(batch_size, num_new, pages, self.num_heads, 2 * self.head_dim)

    def listed(self, num_keys: int) -> tuple[int, int, int]:
        return min(self.top_k - 1, -(-num_keys // self.block_size)) + 1, self.block_size, self.num_heads
