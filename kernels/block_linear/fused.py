"""The block-structured linear maps as one opaque operator with gradients, computed by Triton. Nothing but its inputs is
kept: what lies between the factors is computed again in backward."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.kernels import higher, native
from zoo.kernels.block_linear import chunked, cost


def _triton():
    return importlib.import_module("zoo.kernels.block_linear.triton")


@torch.library.custom_op("zoo::block_linear", mutates_args=())
def _forward(x: Tensor, right: Tensor, left: Tensor | None, mix: Tensor | None) -> Tensor:
    return _triton().forward(x, right, left, mix)


@_forward.register_fake
def _(x, right, left, mix):
    last = right if left is None else left
    return x.new_empty(x.shape[0], last.shape[0] * last.shape[1])


@torch.library.custom_op("zoo::block_linear_backward", mutates_args=())
def _backward(dy: Tensor, x: Tensor, right: Tensor, left: Tensor | None, mix: Tensor | None) -> list[Tensor]:
    """Gradients of x, right and, where they are there, left and mix."""
    return _triton().backward(dy.contiguous(), x, right, left, mix)


@_backward.register_fake
def _(dy, x, right, left, mix):
    return [t.new_empty(t.shape) for t in (x, right, left, mix) if t is not None]


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _gradient(ctx, dy):
    given = ctx.saved_tensors
    if higher.wanted():
        return tuple(higher.gradients(lambda *tensors: (chunked.block_linear(*tensors),), given, (dy,)))
    found = iter(_backward(dy, *given))
    return tuple(None if t is None else next(found) for t in given)


_forward.register_autograd(_gradient, setup_context=_keep)


@register_flop_formula(torch.ops.zoo.block_linear)
def _forward_flops(x_shape, right, left, mix, *args, out_shape=None, **kwargs) -> int:
    return cost.flops(x_shape[0], right, left, mix)


@register_flop_formula(torch.ops.zoo.block_linear_backward)
def _backward_flops(dy, x_shape, right, left, mix, *args, out_shape=None, **kwargs) -> int:
    return cost.backward_flops(x_shape[0], right, left, mix)


def block_linear(x: Tensor, right: Tensor, left: Tensor | None = None, mix: Tensor | None = None) -> Tensor:
    """See `zoo.kernels.block_linear`; x: [N, features]."""
    return _forward(*(None if t is None else t.contiguous() for t in (x, right, left, mix)))


def refuse(x: Tensor, right: Tensor, left: Tensor | None = None, mix: Tensor | None = None) -> str | None:
    """Why the kernels cannot take this call, or None."""
    if any(t is not None and t.dtype != x.dtype for t in (right, left, mix)):
        return "needs one dtype"
    return native.untraceable()
