"""The short convolution by the C core (native.c)."""

from __future__ import annotations

from torch import Tensor

from zoo.kernels import native
from zoo.kernels.short_conv import fused

_SMALL = 1 << 11  # below so many elements the torch form is done before an operator is called


def refuse_fused(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, doc_ids: Tensor | None, activation: str | None
) -> str | None:
    """Why no fused operator can do this call, or None."""
    if x.dtype != weight.dtype or (bias is not None and bias.dtype != x.dtype):
        return "needs one dtype"
    if state is not None and state.shape[1] != weight.shape[1] - 1:
        return f"needs a state of {weight.shape[1] - 1} tokens, got {state.shape[1]}"
    return native.untraceable()


def refuse(x: Tensor, weight: Tensor, bias: Tensor | None, *rest) -> str | None:
    """Why the core should not do this call, or None."""
    small = x.numel() < _SMALL and native.watched(x, weight, bias)
    return "x is small" if small else refuse_fused(x, weight, bias, *rest)


def forward(x, weight, bias, past, doc_ids, silu) -> Tensor:
    """y; everything contiguous and of one dtype."""
    y, taps = x.new_empty(x.shape), weight.flip(1).t().contiguous()
    native.run("short_conv", "forward", x.dtype, x, taps, bias, past, doc_ids, y, *x.shape, weight.shape[1], silu)
    return y


def backward(dy, x, weight, bias, past, doc_ids, silu) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and past."""
    (B, T, D), W = x.shape, weight.shape[1]
    taps = weight.flip(1).t().contiguous()
    dz, dx, dtaps, dbias = x.new_empty(B, T, D), x.new_empty(B, T, D), x.new_empty(W, D), x.new_empty(D)
    dpast = x.new_empty(B, W - 1, D)
    native.run(
        "short_conv", "backward", x.dtype, dy, x, taps, bias, past, doc_ids, dz, dx, dtaps, dbias, dpast,
        B, T, D, W, silu,
    )  # fmt: skip
    return dx, dtaps.t().flip(1).contiguous(), dbias, dpast


def short_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, doc_ids: Tensor | None, activation: str | None
) -> tuple[Tensor, Tensor]:
    """See `zoo.kernels.short_conv.short_conv`."""
    return fused.short_conv(x, weight, bias, state, doc_ids, activation, "native")
