"""The diagonal scan over multipliers a = exp(log_decay) as one opaque operator with gradients; the engine that computes
it is a C core or Triton (see native.py). What is kept for backward is a and h."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from zoo.kernels import higher, native
from zoo.kernels.diagonal_scan import chunked


def _engine(name: str):
    return importlib.import_module(f"zoo.kernels.diagonal_scan.{name}")


@torch.library.custom_op("zoo::diagonal_scan", mutates_args=())
def _forward(a: Tensor, x: Tensor, initial_state: Tensor | None, engine: str) -> Tensor:
    return _engine(engine).forward(a, x, initial_state)


@_forward.register_fake
def _(a, x, initial_state, engine):
    return x.new_empty(x.shape)


@torch.library.custom_op("zoo::diagonal_scan_backward", mutates_args=())
def _backward(
    dh: Tensor, a: Tensor, h: Tensor, initial_state: Tensor | None, engine: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a, x and the initial state."""
    return _engine(engine).backward(dh.contiguous(), a, h, initial_state)


@_backward.register_fake
def _(dh, a, h, initial_state, engine):
    return a.new_empty(a.shape), h.new_empty(h.shape), h.new_empty(h[:, 0].shape)


def _keep(ctx, inputs, output) -> None:
    a, _, initial_state, ctx.engine = inputs
    ctx.save_for_backward(a, initial_state, output)


def _gradient(ctx, dh):
    a, initial_state, h = ctx.saved_tensors
    if higher.wanted():
        # the same sums as differentiable operations: dx_t = dh_t + conj(a_{t+1}) dx_{t+1}, da_t = dx_t conj(h_{t-1})
        later = torch.cat([a[:, 1:], torch.zeros_like(a[:, :1])], 1).conj()
        dx = chunked.linear_scan(later.flip(1), dh.flip(1), None).flip(1)
        first = torch.zeros_like(h[:, 0]) if initial_state is None else initial_state
        da = dx * torch.cat([first[:, None], h[:, :-1]], 1).conj()
        return da, dx, None if initial_state is None else a[:, 0].conj() * dx[:, 0], None
    da, dx, dstate = _backward(dh, a, h, initial_state, ctx.engine)
    return da, dx, None if initial_state is None else dstate, None


_forward.register_autograd(_gradient, setup_context=_keep)


def diagonal_scan(
    log_decay: Tensor, inputs: Tensor, initial_state: Tensor | None, doc_ids: Tensor | None, engine: str
) -> tuple[Tensor, Tensor]:
    """Run an engine. exp, and where a document begins, stay plain operations with their own gradients."""
    decay, wide = chunked.multipliers(log_decay, inputs, doc_ids)
    shape = inputs.shape
    # a copy: streaming writes into the state it gave, and backward still needs what stood there
    state = None
    if initial_state is not None:
        state = initial_state.to(wide).reshape(shape[0], -1).clone(memory_format=torch.contiguous_format)
    given = (*(y.reshape(*shape[:2], -1).contiguous() for y in (decay, inputs.to(wide))), state)
    h = (_forward(*given, engine) if native.watched(*given) else _engine(engine).forward(*given)).view(shape)
    return h if wide.is_complex else h.to(inputs.dtype), h[:, -1]
