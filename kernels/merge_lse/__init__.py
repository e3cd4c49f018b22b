"""Join attention over several sets of keys into attention over their union."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zoo.kernels.dispatch import call, register_row
from zoo.kernels.merge_lse import chunked, reference

register_row("merge_lse", "chunked", chunked.merge_lse, priority=10)
register_row("merge_lse", "reference", reference.merge_lse, priority=0)


def merge_lse(outputs: Sequence[Tensor], lses: Sequence[Tensor], *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """lse = log sum_n exp(lse_n); o = sum_n exp(lse_n - lse) o_n.

    outputs: n tensors [B, T, H, Dv]; lses: n tensors [B, T, H] as `attention(..., need_lse=True)` returns
    them, over disjoint sets of keys; -inf: an empty set, ignored. Returns o in the outputs' dtype and lse in
    the lses'; gradients flow to both. Where every set is empty o = 0 and lse = -inf.
    """
    if len(outputs) == 0 or len(outputs) != len(lses):
        raise ValueError(
            f"merge_lse needs as many lses as outputs and at least one, got {len(outputs)} and {len(lses)}"
        )
    return call("merge_lse", backend, torch.stack(list(outputs)), torch.stack(list(lses)))


def kept(parts: int, heads: int, width: int) -> int:
    """Elements of a token kept for backward: of each part its output, weight and share; their sum; which are empty."""
    return heads * (parts * (width + 2) + 1) + heads * (parts + 1) // 4
