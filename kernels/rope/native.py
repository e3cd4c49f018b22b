"""Rotary embedding by the C core: one pass over x instead of one per product. Its gradient is the turn back."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels import native

_SMALL = 1 << 15  # below so many elements the torch form is done before an operator is called
_FEW = 16  # tokens whose angles the core computes itself


def refuse(
    x: Tensor, positions: Tensor, frequencies: Tensor, amplitude: float, interleaved: bool, inverse: bool
) -> str | None:
    """Why the core should not do this call, or None."""
    if x.numel() >= _SMALL:
        return native.untraceable()
    return "x is small" if native.watched(x) or x.shape[1] > _FEW else None


@torch.library.custom_op("zoo::rotate", mutates_args=(), device_types="cpu")
def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    y, (B, T, H, D) = x.new_empty(x.shape), x.shape
    native.run("rope", "rotate", x.dtype, x.contiguous(), cos, sin, y, B * T, H, D, cos.shape[-1], interleaved)
    return y


@_rotate.register_fake
def _(x, cos, sin, interleaved):
    return x.new_empty(x.shape)


def _keep(ctx, inputs, output) -> None:
    _, cos, sin, ctx.interleaved = inputs
    ctx.save_for_backward(cos, sin)


def _gradient(ctx, grad: Tensor):
    cos, sin = ctx.saved_tensors
    return _rotate(grad.contiguous(), cos, -sin, ctx.interleaved), None, None, None


_rotate.register_autograd(_gradient, setup_context=_keep)


def rope(
    x: Tensor, positions: Tensor, frequencies: Tensor, amplitude: float, interleaved: bool, inverse: bool
) -> Tensor:
    """See `zoo.kernels.rope.rope`."""
    if x.numel() < _SMALL:
        return _rotate_few(x, positions, frequencies, amplitude, interleaved, inverse)
    angle = positions.to(x.dtype)[..., None] * frequencies.to(x.dtype)
    factor = 1 / amplitude if inverse else amplitude
    cos = (angle.cos() * factor).expand(*x.shape[:2], -1).contiguous()
    sin = (angle.sin() * (-factor if inverse else factor)).expand(*x.shape[:2], -1).contiguous()
    return _rotate(x.contiguous(), cos, sin, interleaved)


def _rotate_few(
    x: Tensor, positions: Tensor, frequencies: Tensor, amplitude: float, interleaved: bool, inverse: bool
) -> Tensor:
    """Without the operator, whose cost is above that of turning a few tokens."""
    (B, T, H, D), x = x.shape, x.contiguous()
    y, at = x.new_empty(x.shape), positions.long().expand(B, T).contiguous()
    factor, sign = (1 / amplitude, -1.0) if inverse else (float(amplitude), 1.0)
    half = frequencies.shape[0]
    native.run("rope", "rotate_few", x.dtype, x, at, frequencies, y, B * T, H, D, half, interleaved, factor, sign)
    return y
