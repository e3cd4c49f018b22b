"""Structured linear maps through opaque ops with gradients of any order, computed by the kernels of triton.py.

Where a product is followed or preceded by Monarch's transposition, value f of a row of n values stands at place
(f % L) (n / L) + f // L; L = 1 changes nothing. The product reads with one L and writes with another, so its
gradients are products again, the two exchanged.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


def _triton():
    return importlib.import_module("zoo.kernels.block_linear.triton")


@torch.library.custom_op("zoo::block_mm", mutates_args=())
def block_mm(x: Tensor, weight: Tensor, read: int, write: int) -> Tensor:
    """y_i = W_i x_i: x [N, b K], weight [b, M, K] of any strides, y [N, b M]."""
    return _triton().product(x, weight, read, write)


@torch.library.custom_op("zoo::block_mm_weight", mutates_args=())
def block_mm_weight(x: Tensor, grad: Tensor, blocks: int, read: int, write: int) -> Tensor:
    """[b, M, K]: grad_i^T x_i summed over rows; x as block_mm reads it, grad as it writes it."""
    return _triton().weight_gradient(x, grad, blocks, read, write)


@torch.library.custom_op("zoo::block_mix", mutates_args=())
def block_mix(z: Tensor, scales: Tensor) -> Tensor:
    """h_i = Σ_j s_ij ⊙ z_j: z [N, b r], scales [a, b, r] of any strides, h [N, a r]."""
    return _triton().mix(z, scales)


@torch.library.custom_op("zoo::block_mix_scales", mutates_args=())
def block_mix_scales(grad: Tensor, z: Tensor, rank: int) -> Tensor:
    """[a, b, r]: grad_i ⊙ z_j summed over rows."""
    return _triton().scales_gradient(grad, z, rank)


@torch.library.custom_op("zoo::block_mix_mm", mutates_args=())
def block_mix_mm(z: Tensor, scales: Tensor, weight: Tensor) -> Tensor:
    """y_i = W_i Σ_j s_ij ⊙ z_j, the sum never in memory."""
    return _triton().product(z, weight, 1, 1, scales)


@block_mm.register_fake
def _(x: Tensor, weight: Tensor, read: int, write: int) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0] * weight.shape[1])


@block_mm_weight.register_fake
def _(x: Tensor, grad: Tensor, blocks: int, read: int, write: int) -> Tensor:
    return x.new_empty(blocks, grad.shape[1] // blocks, x.shape[1] // blocks)


@block_mix.register_fake
def _(z: Tensor, scales: Tensor) -> Tensor:
    return z.new_empty(z.shape[0], scales.shape[0] * scales.shape[2])


@block_mix_scales.register_fake
def _(grad: Tensor, z: Tensor, rank: int) -> Tensor:
    return z.new_empty(grad.shape[1] // rank, z.shape[1] // rank, rank)


@block_mix_mm.register_fake
def _(z: Tensor, scales: Tensor, weight: Tensor) -> Tensor:
    return z.new_empty(z.shape[0], weight.shape[0] * weight.shape[1])


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*(a for a in inputs if isinstance(a, Tensor)))
    ctx.numbers = [a for a in inputs if not isinstance(a, Tensor)]


def _product_backward(ctx, grad: Tensor):
    (x, weight), (read, write) = ctx.saved_tensors, ctx.numbers
    dx = block_mm(grad, weight.mT, write, read) if ctx.needs_input_grad[0] else None
    dw = block_mm_weight(x, grad, weight.shape[0], read, write) if ctx.needs_input_grad[1] else None
    return dx, dw, None, None


def _weight_backward(ctx, grad: Tensor):
    (x, g), (_, read, write) = ctx.saved_tensors, ctx.numbers
    dx = block_mm(g, grad.mT, write, read) if ctx.needs_input_grad[0] else None
    dg = block_mm(x, grad, read, write) if ctx.needs_input_grad[1] else None
    return dx, dg, None, None, None


def _mix_backward(ctx, grad: Tensor):
    z, scales = ctx.saved_tensors
    dz = block_mix(grad, scales.transpose(0, 1)) if ctx.needs_input_grad[0] else None
    ds = block_mix_scales(grad, z, scales.shape[2]) if ctx.needs_input_grad[1] else None
    return dz, ds


def _scales_backward(ctx, grad: Tensor):
    g, z = ctx.saved_tensors
    dg = block_mix(z, grad) if ctx.needs_input_grad[0] else None
    dz = block_mix(g, grad.transpose(0, 1)) if ctx.needs_input_grad[1] else None
    return dg, dz, None


def _mix_product_backward(ctx, grad: Tensor):
    z, scales, weight = ctx.saved_tensors
    dz = ds = dw = None
    if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
        dh = block_mm(grad, weight.mT, 1, 1)
        dz = block_mix(dh, scales.transpose(0, 1)) if ctx.needs_input_grad[0] else None
        ds = block_mix_scales(dh, z, scales.shape[2]) if ctx.needs_input_grad[1] else None
    if ctx.needs_input_grad[2]:
        dw = block_mm_weight(block_mix(z, scales), grad, weight.shape[0], 1, 1)  # the sum is cheaper again than kept
    return dz, ds, dw


block_mm.register_autograd(_product_backward, setup_context=_keep)
block_mm_weight.register_autograd(_weight_backward, setup_context=_keep)
block_mix.register_autograd(_mix_backward, setup_context=_keep)
block_mix_scales.register_autograd(_scales_backward, setup_context=_keep)
block_mix_mm.register_autograd(_mix_product_backward, setup_context=_keep)


@register_flop_formula(torch.ops.zoo.block_mm)
def _product_flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * x_shape[0] * weight_shape[0] * weight_shape[1] * weight_shape[2]


@register_flop_formula(torch.ops.zoo.block_mm_weight)
def _weight_flops(x_shape, grad_shape, blocks, *args, out_shape=None, **kwargs) -> int:
    return 2 * x_shape[0] * x_shape[1] * grad_shape[1] // blocks


@register_flop_formula(torch.ops.zoo.block_mix)
def _mix_flops(z_shape, scales_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * z_shape[0] * scales_shape[0] * scales_shape[1] * scales_shape[2]


@register_flop_formula(torch.ops.zoo.block_mix_scales)
def _scales_flops(grad_shape, z_shape, rank, *args, out_shape=None, **kwargs) -> int:
    return 2 * grad_shape[0] * grad_shape[1] * z_shape[1] // rank


@register_flop_formula(torch.ops.zoo.block_mix_mm)
def _mix_product_flops(z_shape, scales_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    return _mix_flops(z_shape, scales_shape) + _product_flops(z_shape, weight_shape)


def block_linear(x: Tensor, first: Tensor, second: Tensor | None = None, scales: Tensor | None = None) -> Tensor:
    """Two launches at most: see `zoo.kernels.block_linear`."""
    if second is None:
        return block_mm(x, first, 1, 1)
    if scales is not None:
        return block_mix_mm(block_mm(x, first, 1, 1), scales, second)
    return block_mm(block_mm(x, first, 1, second.shape[0]), second, 1, second.shape[1])
