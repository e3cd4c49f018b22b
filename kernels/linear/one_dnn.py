"""Matrix products by oneDNN, which torch.compile too puts in place of a CPU's linear layers.

torch.mm is MKL's, which leaves half of the vector units idle on processors other than Intel's: on an AMD EPYC with
AVX-512 90 against 200 GFLOP/s a core, for all three products of a layer's forward and backward.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from zoo.kernels import native

_FEW = 16  # rows for which an opaque operator is not worth its call
_THIN = 8  # rows or columns under which MKL is quicker
_product = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def missing() -> str | None:
    """Why this torch has no such product, or None."""
    return None if _product else "this torch was built without oneDNN"


def refuse(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> str | None:
    """Why torch's own form should do this call, or None."""
    if x.numel() < _FEW * x.shape[-1]:
        return f"fewer than {_FEW} rows"
    if min(weight.shape) < _THIN:
        return f"fewer than {_THIN} features"
    if weight.dtype != x.dtype or torch.is_autocast_enabled("cpu"):
        return "casts are torch's work"
    if not (_plain(x) and _plain(weight)):
        return "takes plain tensors only"
    return native.untraceable()


def _plain(x: Tensor) -> bool:
    dual = not torch.compiler.is_compiling() and forward_ad._current_level >= 0
    return type(x) in (Tensor, torch.nn.Parameter) and not dual


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a b^T of two matrices [M, K] and [N, K] on the CPU."""
    if _product is None or a.dtype != torch.float32 or min(*a.shape, b.shape[0]) < _THIN:
        return torch.mm(a, b.t())
    return _product(_dense(a), _dense(b), None, "none", [], "")


def _dense(x: Tensor) -> Tensor:
    """x, or its copy where neither its rows nor its columns lie one after another: oneDNN then takes a plain loop."""
    return x if x.is_contiguous() or x.t().is_contiguous() else x.contiguous()


@torch.library.custom_op("zoo::linear", mutates_args=(), device_types="cpu")
def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return matmul(x, weight)


@_linear.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad: Tensor):
    x, weight = ctx.saved_tensors
    grad = grad.contiguous()
    dx = _linear(grad, weight.t()) if ctx.needs_input_grad[0] else None
    dw = _linear(grad.t(), x.t()) if ctx.needs_input_grad[1] else None
    return dx, dw


_linear.register_autograd(_backward, setup_context=_keep)


@register_flop_formula(torch.ops.zoo.linear)
def _flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * x_shape[0] * x_shape[1] * weight_shape[0]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + b by oneDNN."""
    y = _linear(x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], weight.shape[0])
    return y if bias is None else y + bias
