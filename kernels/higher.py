"""Derivatives of derivatives: a fused operator's backward is opaque, so where the gradient itself will be
differentiated (`create_graph=True`) it is taken through the op's traceable form instead."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def wanted() -> bool:
    """Inside a backward function: will its result be differentiated?"""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def gradients(
    fn: Callable, tensors: Sequence[Tensor | None], cotangents: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Differentiable gradients of fn(*tensors), for each tensor, where `cotangents` are those of fn's outputs."""
    outputs = fn(*tensors)
    pairs = [(y, g) for y, g in zip(outputs, cotangents) if g is not None and y is not None and y.requires_grad]
    wrt = [x for x in tensors if x is not None and x.requires_grad]
    if not pairs or not wrt:
        return [None] * len(tensors)
    ys, gs = zip(*pairs)
    found = iter(torch.autograd.grad(ys, wrt, gs, create_graph=True, allow_unused=True))
    return [next(found) if x is not None and x.requires_grad else None for x in tensors]
