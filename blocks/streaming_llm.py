"""StreamingLLM: the first tokens and a window, at positions inside the cache. Xiao et al. 2023, arXiv:2309.17453.

d_t  = max(0, t + 1 - sinks - window)                     tokens that have been dropped when t comes
o_t  = softmax over j > t - window at distance t - j, and j < sinks outside the window at distance t - d_t - j
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from zoo.blocks.cache_policy import CachePolicy
from zoo.blocks.kv_cache import RingKVCache, kv_cache_bytes, ring_slots
from zoo.contract import State, positions_from
from zoo.kernels import sparse_attention as attending
from zoo.kernels import work
from zoo.kernels.attention import attention, attention_flops
from zoo.kernels.block_list import BlockList
from zoo.kernels.merge_lse import kept as merge_kept
from zoo.kernels.merge_lse import merge_lse
from zoo.kernels.sparse_attention import sparse_attention
from zoo.registry import register
from zoo.schema import PositiveInt


@register(
    "streaming_llm",
    kind="cache",
    paper="arXiv:2309.17453",
    ops=("attention", "sparse_attention", "merge_lse"),
    state_growth="constant",
    relations=(
        "attention(cache={'streaming_llm': {'window': 4096}}) == attention()",
        "attention(rope=False, cache={'streaming_llm': {'sinks': 3, 'window': 9}}) =="
        " attention(rope=False, sinks=3, window=9)",
    ),
    examples=({"sinks": 4, "window": 12},),
)
class StreamingLLM(CachePolicy):
    """The first `sinks` tokens and the last `window`; sinks stand right before the window, wherever it is.

    A token's distance to another of its window is the true one; to a sink outside, it is less by the number of tokens
    that were dropped between, so no distance is larger than the cache: `window` and `sinks` of attention itself keep
    true distances, which is the same without rope. State: sinks + window tokens. A window of T is attention.
    Useful: 4 H d FLOPs for each token of the window, and each sink.
    """

    def __init__(self, *, sinks: PositiveInt = 4, window: PositiveInt = 1020):
        self.sinks, self.window = sinks, window

    def init_state(self, batch_size: int, max_len: int | None, like: Tensor) -> RingKVCache:
        shape = (batch_size, max_len, self.num_kv_heads, self.head_dim)
        return RingKVCache.create(*shape, window=self.window, sinks=self.sinks, like=like)

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        positions: Tensor,
        *,
        rotate: Callable[[Tensor, Tensor], Tensor],
        doc_ids: Tensor | None = None,
        state: State | None = None,
        backend: str = "auto",
    ) -> Tensor:
        B, T = q.shape[:2]
        k = rotate(k, positions)
        docs = {"q_doc_ids": doc_ids, "k_doc_ids": doc_ids}
        given = {"scale": self.scale, **docs}
        k_index = q_index = None
        if isinstance(state, RingKVCache):
            k, v, k_index, q_index = state.append(k, v)
        place = positions_from(doc_ids, B, T, q.device) if q_index is None else q_index
        near = attention(
            rotate(q, positions), k, v, window=self.window, q_index=q_index, k_index=k_index, need_lse=True, **given,
            backend=backend,
        )  # fmt: skip
        q = rotate(q, positions - (place + 1 - self.sinks - self.window).clamp(min=0))
        if k_index is None:
            index = torch.arange(T, device=q.device).expand(B, T)
            first = (index - place)[:, None, :, None].int()
            blocks = BlockList(first, kv_block=self.sinks, stride=1)
            far = sparse_attention(q, k, v, blocks, q_index=index - self.window, k_index=index, **given)
        else:  # rows of a cache hold their sinks where they may
            sink = torch.where(k_index < self.sinks, k_index, -1)
            far = attention(q, k, v, q_index=place - self.window, k_index=sink, need_lse=True, **given, backend=backend)
        return merge_lse([near[0], far[0]], [lse for lse in (near[1], far[1]) if lse is not None])[0]

    def flops(self, batch_size: int, seq_len: int, context_len: int, streaming: bool) -> int:
        B, T, H, D = batch_size, seq_len, self.num_heads, self.head_dim
        if not streaming:
            near = attention_flops(B, T, T, H, D, window=self.window, fused=False)
            return near + attending.flops(B, T, T, H, self.num_kv_heads, D, D, 1, self.sinks, 1, stride=1)
        held = min(context_len, ring_slots(None, self.window, self.sinks))
        keys = min(held + T, ring_slots(None, self.window, self.sinks)) if T == 1 else held + T
        return 2 * attention_flops(B, T, keys, H, D, plain=False, fused=False)

    def scores(self, seq_len: int, context_len: int) -> int:
        return self.num_heads * work.window_pairs(seq_len, context_len, self.window, self.sinks)

    def state_bytes(self, max_len: int, itemsize: int) -> int:
        slots = ring_slots(max_len, self.window, self.sinks)
        return kv_cache_bytes(1, slots, self.num_kv_heads, self.head_dim, self.head_dim, itemsize)

    def kept(self, seq_len: int, rotary_dim: int) -> int:
        # k, v; twice q and o with its denominators; cos and sin thrice; one sink and a place; what merging keeps, y
        H, D = self.num_heads, self.head_dim
        token = 2 * self.num_kv_heads * D + H * (4 * D + 2) + 3 * rotary_dim + 3
        return seq_len * (token + merge_kept(2, H, D) + H * D)
