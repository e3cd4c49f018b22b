"""Cache policies: what `attention` keeps of the past. `cache: h2o`, or `cache: {h2o: {heavy: 64}}`.

A policy is one file: a subclass of `CachePolicy`, registered with kind="cache", its options the keywords of its
constructor. It has no parameters. A token sees what a cache would still hold when it comes, so training, prefill and
decoding agree. `streaming_llm` and `h2o` forget, so that the state does not grow; `prefix_tree` keeps all, and what
rows have in common once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from zoo.contract import State
from zoo.kernels import work


class CachePolicy:
    """Base of cache policies: the state, and attention to what it holds."""

    cuts_gradient: str = ""  # as of a block
    expectation: str = ""  # likewise
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float

    def bind(self, num_heads: int, num_kv_heads: int, head_dim: int, scale: float) -> None:
        """Called once by the block whose cache it is; scores are multiplied by `scale`."""
        self.num_heads, self.num_kv_heads, self.head_dim, self.scale = num_heads, num_kv_heads, head_dim, scale

    def init_state(self, batch_size: int, max_len: int | None, like: Tensor) -> Any:
        """An empty state of `like`'s dtype and device, with `length` [B]."""
        raise NotImplementedError

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
        """Attention o [B, T, Hq, D] of queries and keys at `positions` [B, T] that `rotate` has not yet rotated."""
        raise NotImplementedError

    def flops(self, batch_size: int, seq_len: int, context_len: int, streaming: bool) -> int:
        """Matrix FLOPs of a call."""
        raise NotImplementedError

    def scores(self, seq_len: int, context_len: int) -> int:
        """Scores that a row's softmax runs over, of all heads: of all tokens before, where it forgets none."""
        return self.num_heads * work.pairs(seq_len, context_len)

    def state_bytes(self, max_len: int, itemsize: int) -> int:
        """Bytes of a full row's state, of keys of `itemsize` bytes; rows that could share some are counted apart."""
        raise NotImplementedError

    def kept(self, seq_len: int, rotary_dim: int) -> int:
        """Elements of a row kept for backward between the projections and W_o."""
        raise NotImplementedError
