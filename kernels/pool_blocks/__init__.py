"""One vector per block of consecutive tokens: the keys that block selection scores."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from zoo.kernels.dispatch import call, register_row
from zoo.kernels.pool_blocks import chunked, reference
from zoo.kernels.pool_blocks.cost import flops

register_row("pool_blocks", "chunked", chunked.pool_blocks, priority=10)
register_row("pool_blocks", "reference", reference.pool_blocks, priority=0)


def pool_blocks(
    x: Tensor,
    block_size: int,
    *,
    mode: Literal["mean", "max", "min"] = "mean",
    doc_ids: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Pool every complete block of `block_size` tokens, in fp32 (fp64 where x is).

    x: [B, T, H, D]; doc_ids: [B, T], blocks are counted from each document's start and an incomplete last
    block is left out. Returns pooled [B, N, H, D] and start int64 [B, N] with N = ceil(T / block_size): slot j
    holds the complete block that starts at token start[j] in [j * block_size, (j+1) * block_size), of which
    there is at most one; start = -1 and zeros where there is none.
    """
    return call("pool_blocks", backend, x, block_size, mode, doc_ids)


__all__ = ["flops", "pool_blocks"]
