"""The best tokens of a growing prefix, after every complete chunk."""

from __future__ import annotations

from torch import Tensor

from zoo.kernels.dispatch import call, register_row
from zoo.kernels.prefix_topk import chunked, reference
from zoo.kernels.prefix_topk.chunked import merge_topk
from zoo.kernels.prefix_topk.cost import flops

register_row("prefix_topk", "chunked", chunked.prefix_topk, priority=10)
register_row("prefix_topk", "reference", reference.prefix_topk, priority=0)


def prefix_topk(
    scores: Tensor, k: int, chunk_size: int, *, doc_ids: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """The `k` tokens of highest score among all that precede the end of each complete chunk.

    scores: [B, T]; doc_ids: [B, T], chunks are counted from each document's start and a prefix starts there.
    Returns idx int32 [B, N, k], N = ceil(T / chunk_size): slot j belongs to the complete chunk that starts in
    [j * chunk_size, (j+1) * chunk_size), holds token indices in ascending order and -1 at the end where there
    are fewer. Equal scores go to the earlier token. Never differentiates.
    """
    return call("prefix_topk", backend, scores.detach(), k, chunk_size, doc_ids)


__all__ = ["flops", "merge_topk", "prefix_topk"]
