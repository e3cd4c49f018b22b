"""Grouped matrix product as one opaque op with gradients: torch's own kernel, Triton, or one `mm` per group.

torch.nn.functional.grouped_mm alone traces only in bf16 on a CPU and is invisible to FLOP counters; behind a
custom op every dtype compiles, exports and is counted.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from zoo.kernels.linear.one_dnn import matmul

TORCH_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ALIGNMENT = 16  # bytes


def _triton():
    return importlib.import_module("zoo.kernels.grouped_mm.triton")


def _ends(counts: Tensor) -> Tensor:
    return counts.cumsum(0).to(torch.int32)


@torch.library.custom_op("zoo::grouped_mm", mutates_args=())
def _forward(x: Tensor, weight: Tensor, counts: Tensor, engine: str) -> Tensor:
    if engine == "triton":
        return _triton().forward(x, weight, counts)
    if engine == "torch":
        return F.grouped_mm(x.contiguous(), weight, offs=_ends(counts)).contiguous()
    y = x.new_empty(x.shape[0], weight.shape[2])
    start = 0
    for matrix, n in zip(weight, counts.tolist(), strict=True):
        if n:
            y[start : start + n] = matmul(x[start : start + n], matrix.t())
        start += n
    if start != x.shape[0]:
        raise ValueError(f"grouped_mm: counts sum to {start}, x has {x.shape[0]} rows")
    return y


@torch.library.custom_op("zoo::grouped_mm_weight", mutates_args=())
def _weight_gradient(x: Tensor, grad: Tensor, counts: Tensor, engine: str) -> Tensor:
    """[E, K, M]: x_e^T grad_e for the rows of each group."""
    if engine == "triton":
        return _triton().weight_gradient(x, grad, counts)
    if engine == "torch":
        return F.grouped_mm(x.contiguous().t(), grad.contiguous(), offs=_ends(counts)).contiguous()
    out = x.new_empty(len(counts), x.shape[1], grad.shape[1])
    start = 0
    for matrix, n in zip(out, counts.tolist(), strict=True):
        matrix.copy_(matmul(x[start : start + n].t(), grad[start : start + n].t()))  # zeros where a group has no rows
        start += n
    return out


@_forward.register_fake
def _(x: Tensor, weight: Tensor, counts: Tensor, engine: str) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[2])


@_weight_gradient.register_fake
def _(x: Tensor, grad: Tensor, counts: Tensor, engine: str) -> Tensor:
    return x.new_empty(counts.shape[0], x.shape[1], grad.shape[1])


def _keep(ctx, inputs, output) -> None:
    a, b, counts, ctx.engine = inputs
    ctx.save_for_backward(a, b, counts)


def _forward_backward(ctx, grad: Tensor):
    x, weight, counts = ctx.saved_tensors
    grad = grad.contiguous()  # torch's kernel refuses expanded gradients
    dx = _forward(grad, weight.transpose(1, 2), counts, ctx.engine) if ctx.needs_input_grad[0] else None
    dw = None
    if ctx.needs_input_grad[1] and weight.stride(1) < weight.stride(2):
        # a transposed view: a gradient laid out like what it views is taken as it is, any other would be copied
        dw = _weight_gradient(grad, x, counts, ctx.engine).transpose(1, 2)
    elif ctx.needs_input_grad[1]:
        dw = _weight_gradient(x, grad, counts, ctx.engine)
    return dx, dw, None, None


def _weight_backward(ctx, grad: Tensor):
    x, g, counts = ctx.saved_tensors
    grad = grad.contiguous()
    dx = _forward(g, grad.transpose(1, 2), counts, ctx.engine) if ctx.needs_input_grad[0] else None
    dg = _forward(x, grad, counts, ctx.engine) if ctx.needs_input_grad[1] else None
    return dx, dg, None, None


_forward.register_autograd(_forward_backward, setup_context=_keep)
_weight_gradient.register_autograd(_weight_backward, setup_context=_keep)


@register_flop_formula(torch.ops.zoo.grouped_mm)
def _forward_flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * x_shape[0] * weight_shape[1] * weight_shape[2]


@register_flop_formula(torch.ops.zoo.grouped_mm_weight)
def _weight_flops(x_shape, grad_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * x_shape[0] * x_shape[1] * grad_shape[1]


def loop(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """One matrix product per group."""
    return _forward(x, weight, counts, "loop")


def triton(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Our Triton kernels."""
    return _forward(x, weight, counts, "triton")


def torch_grouped_mm(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """torch.nn.functional.grouped_mm."""
    return _forward(x, weight, counts, "torch")


def triton_refuses(x: Tensor, weight: Tensor, counts: Tensor) -> str | None:
    """Why the Triton kernels cannot take this call, or None."""
    return None if weight.dtype == x.dtype else f"needs one dtype, x is {x.dtype} and weight {weight.dtype}"


def torch_refuses(x: Tensor, weight: Tensor, counts: Tensor) -> str | None:
    """Why torch.nn.functional.grouped_mm cannot take this call, or None."""
    if weight.dtype != x.dtype:
        return f"needs one dtype, x is {x.dtype} and weight {weight.dtype}"
    for name, size in (("K", weight.shape[1]), ("M", weight.shape[2])):
        if size * x.element_size() % _ALIGNMENT:
            return f"{name} = {size} rows are not a multiple of {_ALIGNMENT} bytes"
    if 1 not in weight.stride()[1:]:
        return "weight must be contiguous along K or along M"
    return None
