"""A few rows through a layer by the C core (native.c), which reads weights as fast as their cache gives them."""

from __future__ import annotations

from torch import Tensor

from zoo.kernels import native

MOST = 15  # rows
_SMALL = 1 << 14  # weights below which nothing is gained


def refuse(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> str | None:
    """Why the core should not do this call, or None."""
    if not 0 < x.numel() <= MOST * x.shape[-1]:
        return f"has 1 to {MOST} rows"
    if weight.numel() < _SMALL:
        return "the weight is small"
    if weight.dtype != x.dtype or not weight.is_contiguous() or (bias is not None and bias.dtype != x.dtype):
        return "needs one dtype and a contiguous weight"
    return native.watched(x, weight, bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + b without gradients."""
    N, K = weight.shape
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], N)
    native.run("linear", "forward", x.dtype, x, weight, bias, y, x.numel() // K, N, K)
    return y
