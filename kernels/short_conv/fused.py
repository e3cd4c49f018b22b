"""The short convolution with its bias and SiLU as one opaque operator with gradients; the engine that computes it is a
C core or Triton (see native.py). Nothing but its inputs is kept for backward."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from zoo.kernels import higher, native
from zoo.kernels.short_conv import chunked


def _engine(name: str):
    return importlib.import_module(f"zoo.kernels.short_conv.{name}")


@torch.library.custom_op("zoo::short_conv", mutates_args=())
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor | None, doc_ids: Tensor | None, silu: bool, engine: str
) -> Tensor:
    return _engine(engine).forward(x, weight, bias, past, doc_ids, silu)


@_forward.register_fake
def _(x, weight, bias, past, doc_ids, silu, engine):
    return x.new_empty(x.shape)


@torch.library.custom_op("zoo::short_conv_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor | None, doc_ids: Tensor | None,
    silu: bool, engine: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, weight [D, W], bias [D] and past [B, W - 1, D], the last two also where there is none."""
    return _engine(engine).backward(dy.contiguous(), x, weight, bias, past, doc_ids, silu)


@_backward.register_fake
def _(dy, x, weight, bias, past, doc_ids, silu, engine):
    D = x.shape[2]
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(D), _no_past(x, weight)


def _no_past(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1] - 1, x.shape[2])


def _keep(ctx, inputs, output) -> None:
    *tensors, ctx.silu, ctx.engine = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx, dy):
    x, weight, bias, past, docs = ctx.saved_tensors
    if higher.wanted():
        activation = "silu" if ctx.silu else None

        def again(x, weight, bias, past):
            return chunked.short_conv(x, weight, bias, past, docs, activation)[:1]

        return *higher.gradients(again, (x, weight, bias, past), (dy,)), None, None, None
    dx, dweight, dbias, dpast = _backward(dy, x, weight, bias, past, docs, ctx.silu, ctx.engine)
    return dx, dweight, None if bias is None else dbias, None if past is None else dpast, None, None, None


_forward.register_autograd(_gradient, setup_context=_keep)


def short_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, doc_ids: Tensor | None,
    activation: str | None, engine: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Run an engine. The new state is a copy of the last inputs, so its gradient needs no kernel."""
    T, back = x.shape[1], weight.shape[1] - 1
    # a copy: streaming writes into the state it gave, and backward still needs what stood there
    past = None if state is None else state.to(x.dtype).clone(memory_format=torch.contiguous_format)
    docs = None if doc_ids is None else doc_ids.long().expand(x.shape[:2]).contiguous()
    x = x.contiguous()
    given = (x, weight.contiguous(), bias, past, docs, activation == "silu")
    y = _forward(*given, engine) if native.watched(x, weight, bias, past) else _engine(engine).forward(*given)
    if back <= T:
        return y, x[:, T - back :].clone()
    before = x.new_zeros(x.shape[0], back, x.shape[2]) if past is None else past
    return y, torch.cat([before[:, T:], x], 1)
