"""The best key blocks of each query: scored and chosen in one step, without the table of all scores."""

from __future__ import annotations

from torch import Tensor

from zoo.kernels import gpu, native
from zoo.kernels.block_list import BlockList
from zoo.kernels.dispatch import call, register_row
from zoo.kernels.select_blocks import chunked, reference
from zoo.kernels.select_blocks.cost import flops

MOST = 64  # the list of a query stays in registers


def _refuse(q: Tensor, keys: Tensor, k: int, *rest: object) -> str | None:
    if k > MOST:
        return f"keeps at most {MOST} blocks of a query in registers, not {k}"
    return native.untraceable() or ("head dimensions above 256" if q.shape[3] > 256 else None)


gpu.register_triton_row("select_blocks", "zoo.kernels.select_blocks.triton:select_blocks", refuse=_refuse)
register_row("select_blocks", "chunked", chunked.select_blocks, priority=10)
register_row("select_blocks", "reference", reference.select_blocks, priority=0)


def select_blocks(
    q: Tensor,
    keys: Tensor,
    k: int,
    *,
    q_index: Tensor,
    k_index: Tensor,
    q_doc_ids: Tensor | None = None,
    k_doc_ids: Tensor | None = None,
    scale: float = 1.0,
    forced: Tensor | None = None,
    visible: Tensor | None = None,
    kv_block: int = 1,
    backend: str = "auto",
) -> BlockList:
    """select(block_scores(q, keys, ...), k, forced=forced, visible=visible), for each query and query head.

    q: [B, T, Hq, D]; keys: [B, N, Hkv, D]; q_index, k_index, doc ids and scale as `block_scores` takes them, forced
    and visible (bool, broadcastable to [B, Hq, T, N]) as `select` does: at most `k` of the blocks that end before
    the query, the forced ones first, equal scores to the lowest index. Not differentiable.
    Returns lists of min(k, N) slots, idx [B, Hq, T, min(k, N)].
    """
    if k < 0:
        raise ValueError(f"k must be at least 0, got {k}")
    masks = (q_index, k_index, q_doc_ids, k_doc_ids, scale, forced, visible)
    idx = call("select_blocks", backend, q.detach(), keys.detach(), min(k, keys.shape[1]), *masks)
    return BlockList(idx, kv_block=kv_block)


__all__ = ["BlockList", "flops", "select_blocks"]
