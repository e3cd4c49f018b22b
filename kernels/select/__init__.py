"""From block scores to a BlockList. Never differentiates: gradients reach a router some other way."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from zoo.kernels.block_list import BlockList, block_mask, sort_ids
from zoo.kernels.dispatch import call, register_row
from zoo.kernels.select import chunked, reference
from zoo.kernels.select.cost import flops

register_row("select", "chunked", chunked.select, priority=10)
register_row("select", "reference", reference.select, priority=0)


def select(
    scores: Tensor,
    k: int,
    *,
    rule: Literal["topk", "top_p", "threshold"] = "topk",
    limit: float = 0.0,
    forced: Tensor | None = None,
    visible: Tensor | None = None,
    q_tile: int = 1,
    kv_block: int = 1,
    backend: str = "auto",
) -> BlockList:
    """Choose at most `k` blocks per row of scores.

    scores: [B, Hs, Nq, N], -inf = not selectable; visible: bool, broadcastable to scores, False adds -inf;
    forced: bool, broadcastable, visible blocks that rank before all others and count within k. Equal scores
    go to the lowest index.
    rule "topk": the k best. "top_p": as many of the best as are needed for a share `limit` of the softmax
    probability, the crossing one included. "threshold": those with score >= limit. Forced blocks are kept
    under every rule. Returns lists of min(k, N) slots.
    """
    if rule not in ("topk", "top_p", "threshold"):
        raise ValueError(f"rule must be topk, top_p or threshold, got {rule!r}")
    if k < 0:
        raise ValueError(f"k must be at least 0, got {k}")
    idx = call("select", backend, scores.detach(), min(k, scores.shape[-1]), rule, limit, forced, visible)
    return BlockList(idx, q_tile=q_tile, kv_block=kv_block)


__all__ = ["BlockList", "block_mask", "flops", "select", "sort_ids"]
