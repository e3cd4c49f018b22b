"""Grouped matrix product by torch's own kernel, for inference."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

TORCH_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ALIGNMENT = 16  # bytes


def torch_grouped_mm(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """torch.nn.functional.grouped_mm."""
    return F.grouped_mm(x.contiguous(), weight, offs=counts.cumsum(0).to(torch.int32)).contiguous()


def torch_refuses(x: Tensor, weight: Tensor, counts: Tensor) -> str | None:
    """Why torch's kernel cannot take this call, or None."""
    if not hasattr(F, "grouped_mm"):
        return "is not part of this torch"
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or x.is_meta:
        return "runs, but neither traces nor takes every gradient"
    if weight.dtype != x.dtype or 1 not in weight.stride()[1:]:
        return "needs one dtype, and a weight that is contiguous along a dimension"
    if any(size * x.element_size() % _ALIGNMENT for size in weight.shape[1:]):
        return f"needs rows of a multiple of {_ALIGNMENT} bytes"
    return None
