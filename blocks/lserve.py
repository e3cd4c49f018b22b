"""LServe: some heads stream (first and last tokens), the others read the pages whose bounds promise most.
Yang et al. 2025, arXiv:2502.14866; heads that stream: DuoAttention, arXiv:2410.10819; bounds: Quest.

    u_P  = max over the logical pages p of page P of sum_d max(q_d max_p k_d, q_d min_p k_d)
    S(t) = {own page} + the top_k - 1 pages before it with the largest u_P       heads that do not stream
    S(t) = the pages of the first `sinks` and of the last `window` tokens        heads that do
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.blocks.quest import bound_queries, bounds
from zoo.blocks.selection import KeyBlocks, Part, Policy, SelectState
from zoo.kernels import block_scores as scoring
from zoo.kernels import work
from zoo.kernels.block_list import BlockList
from zoo.kernels.block_scores import block_scores
from zoo.kernels.select import select
from zoo.registry import register
from zoo.schema import NonNegativeInt, PositiveInt


@register(
    "lserve",
    kind="select",
    paper="arXiv:2502.14866",
    ops=("sparse_attention", "block_scores", "select"),
    state_growth="linear",
    relations=(
        "attention(select={'lserve': {'streaming_heads': []}}) == attention()",
        "attention(num_heads=4, num_kv_heads=2, select={'lserve': {'streaming_heads': [0, 1], 'block_size': 1, "
        "'page_size': 1, 'sinks': 3, 'window': 9}}) == attention(num_heads=4, num_kv_heads=2, sinks=3, window=9)",
        "attention(select={'lserve': {'window': 4096}}) == attention()",
    ),
    examples=({"block_size": 8, "page_size": 4, "top_k": 3, "sinks": 8, "window": 16},),
)
class LServe(Policy):
    """Streaming heads read the first and the last tokens, the other heads their best pages by a two-level bound.

    Key heads named in `streaming_heads` (null: the later half of them) stream; their query heads read whole pages of
    block_size tokens, those of the first `sinks` tokens and of `window` tokens up to the own page's end. The others
    read their own page and the top_k - 1 earlier ones with the largest bound, the most over a page's logical pages of
    page_size keys (a tighter bound than one over the page); each query head for itself, and anew for each token, where
    the paper selects in decoding alone and keeps a choice for four tokens.
    State: 2 / page_size of the cache; the cache holds the keys of streaming heads too. No head that streams, or a
    window of T, and top_k of all pages is attention.
    Useful: 4 d FLOPs for each key of the pages that a query head reads, and 4 d for each bound of the heads that
    choose.
    """

    by_head = True

    def __init__(
        self,
        *,
        block_size: PositiveInt = 64,
        page_size: PositiveInt = 16,
        top_k: PositiveInt = 64,
        sinks: NonNegativeInt = 128,
        window: PositiveInt = 256,
        streaming_heads: list[int] | None = None,
    ):
        if block_size % page_size:
            raise ValueError(f"lserve: page_size={page_size} must divide block_size={block_size}")
        if sinks % block_size or window % block_size:
            raise ValueError(
                f"lserve: sinks={sinks} and window={window} are read in pages: make them multiples of "
                f"block_size={block_size}"
            )
        self.block_size, self.page_size, self.top_k = block_size, page_size, top_k
        self.sinks, self.window, self.streaming_heads = sinks, window, streaming_heads

    def bind(self, num_heads: int, num_kv_heads: int, head_dim: int, scale: float) -> None:
        super().bind(num_heads, num_kv_heads, head_dim, scale)
        chosen = self.streaming_heads
        streaming = set(range(-(-num_kv_heads // 2), num_kv_heads) if chosen is None else chosen)
        if wrong := sorted(h for h in streaming if not 0 <= h < num_kv_heads):
            raise ValueError(f"lserve: streaming_heads names {wrong}, and there are {num_kv_heads} key heads, from 0")
        self.dense = [h for h in range(num_kv_heads) if h not in streaming]
        group = num_heads // num_kv_heads
        self.dense_queries = [h * group + i for h in self.dense for i in range(group)]

    @property
    def expectation(self) -> str:
        if not self.dense:
            return ""
        return f"lserve: a query head reads {self.top_k} pages of {self.block_size} keys, no two of a call the same"

    def prepare(self, whole: Part, k: Tensor, state: SelectState | None) -> tuple[KeyBlocks, Tensor]:
        def summary(keys: Tensor) -> Tensor:
            return bounds(keys.unflatten(2, (-1, self.page_size)), 3)

        return self.block_table(whole, k, self.block_size, state, summary)

    def blocks(self, part: Part, prepared: tuple[KeyBlocks, Tensor]) -> BlockList:
        pages, table = prepared
        past, size = pages.past(part), self.block_size
        first, own = (part.new(part.index - part.place), pages.own(part))
        start = pages.start[:, None]
        near = (start < first[..., None] + self.sinks) | (start > own[..., None] - self.window)
        slots, N = self.listed(past.shape[-1] * size)[0] - 1, past.shape[-1]
        near_scores = torch.zeros_like(past, dtype=torch.float32)[:, None]
        best = select(near_scores, min(slots, N), visible=(past & near)[:, None]).idx
        best = F.pad(best, (0, slots - best.shape[-1]), value=-1).expand(-1, self.num_heads, -1, -1)
        if self.dense:
            masks, m = pages.masks(part), size // self.page_size
            for name in ("k_index", "k_doc_ids"):  # a logical page is seen when its page is complete
                if name in masks:
                    masks[name] = masks[name].repeat_interleave(m, 1)
            q, keys = (
                bound_queries(part.new(part.q)[:, :, self.dense_queries]),
                table[:, :, :, self.dense].flatten(1, 2),
            )
            scores = block_scores(q, keys, **masks).unflatten(-1, (N, m)).amax(-1)
            chosen = select(scores, self.top_k - 1).idx
            chosen = F.pad(chosen, (0, slots - chosen.shape[-1]), value=-1)
            best = best.index_copy(1, torch.tensor(self.dense_queries, device=best.device), chosen)
        return pages.lists(best, part)

    def table_shape(self, num_keys: int) -> tuple[int, ...]:
        pages = -(-num_keys // self.block_size)
        return (pages, self.block_size // self.page_size, self.num_kv_heads, 2 * self.head_dim)

    def scoring_flops(self, batch_size: int, num_queries: int, num_new: int, num_keys: int) -> int:
        logical = -(-num_keys // self.block_size) * (self.block_size // self.page_size)
        return scoring.flops(batch_size, num_new, logical, len(self.dense_queries), 2 * self.head_dim)

    def scores(self, num_queries: int, context_len: int) -> int:
        near, dense = (self.sinks + self.window) // self.block_size, len(self.dense_queries)
        pages = (dense, self.top_k), (self.num_heads - dense, near)
        return sum(heads * work.block_pairs(num_queries, context_len, self.block_size, most) for heads, most in pages)

    def listed(self, num_keys: int) -> tuple[int, int, int]:
        near = (self.sinks + self.window) // self.block_size
        most = max(near, self.top_k if self.dense else 1)
        return min(most - 1, -(-num_keys // self.block_size)) + 1, self.block_size, self.num_heads
