"""The selective scan as one opaque operator with gradients; the engine that computes it is a C core or Triton.

An engine has `forward` and `backward` (see native.py). Forward saves the state before every `interval` tokens;
backward rebuilds everything else from them, so nothing of size [B, T, E, N] exists.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.kernels import higher, native
from zoo.kernels.selective_scan import chunked
from zoo.kernels.selective_scan.cost import flops


def _engine(name: str) -> ModuleType:
    return importlib.import_module(f"zoo.kernels.selective_scan.{name}")


@torch.library.custom_op("zoo::selective_scan_fused", mutates_args=())
def _forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None, doc_ids: Tensor | None,
    interval: int, keep: bool, engine: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    y, last, states = _outputs(u, A, interval, keep)
    _engine(engine).forward(u, delta, A, B, C, initial_state, doc_ids, interval, y, last, states if keep else None)
    return y, last, states


def _outputs(u: Tensor, A: Tensor, interval: int, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    (batch, T, E), N = u.shape, A.shape[1]
    count = -(-T // interval) if keep else 0
    lanes = 64 // A.itemsize  # saved states have room for whole vectors of channels
    states = A.new_empty(batch, count, -(-E // lanes) * lanes, N)
    return u.new_empty(u.shape), A.new_empty(batch, E, N), states


@_forward.register_fake
def _(u, delta, A, B, C, initial_state, doc_ids, interval, keep, engine):
    return _outputs(u, A, interval, keep)


@torch.library.custom_op("zoo::selective_scan_fused_backward", mutates_args=())
def _backward(
    dy: Tensor, dlast: Tensor | None, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor,
    doc_ids: Tensor | None, states: Tensor, interval: int, engine: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of u, delta, A, B, C and the initial state."""
    dlast = None if dlast is None else dlast.contiguous()
    return _engine(engine).backward(dy.contiguous(), dlast, u, delta, A, B, C, doc_ids, states, interval)


@_backward.register_fake
def _(dy, dlast, u, delta, A, B, C, doc_ids, states, interval, engine):
    return *(x.new_empty(x.shape) for x in (u, delta, A, B, C)), A.new_empty(u.shape[0], *A.shape)


def _keep(ctx, inputs, output) -> None:
    u, delta, A, B, C, initial_state, doc_ids, ctx.interval, _, ctx.engine = inputs
    ctx.starts_somewhere = initial_state is not None
    ctx.save_for_backward(u, delta, A, B, C, doc_ids, output[2], initial_state)
    ctx.set_materialize_grads(False)


def _gradient(ctx, dy, dlast, _):
    u, delta, A, B, C, docs, states, initial = ctx.saved_tensors
    if higher.wanted():
        again = functools.partial(chunked.selective_scan, doc_ids=docs, chunk_size=16)
        grads = higher.gradients(again, (u, delta, A, B, C, initial), (dy, dlast))
        return *grads, None, None, None, None
    dy = torch.zeros_like(u) if dy is None else dy
    *grads, dh = _backward(dy, dlast, u, delta, A, B, C, docs, states, ctx.interval, ctx.engine)
    return *grads, dh if ctx.starts_somewhere else None, None, None, None, None


_forward.register_autograd(_gradient, setup_context=_keep)


@register_flop_formula(torch.ops.zoo.selective_scan_fused)
def _(u, delta, A, *args, **kwargs) -> int:
    return flops(*u, state_dim=A[1])


@register_flop_formula(torch.ops.zoo.selective_scan_fused_backward)
def _(dy, dlast, u, delta, A, *args, **kwargs) -> int:
    return 3 * flops(*u, state_dim=A[1])  # gradients of B, C and of the inputs


def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None, doc_ids: Tensor | None,
    interval: int, engine: ModuleType,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Run an engine; its name is the last part of its module's."""
    given = [x.contiguous() for x in (u, delta, A, B, C)]
    state = None if initial_state is None else initial_state.to(A.dtype).contiguous()
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*given, state))
    if u.shape[1] == 1 and not keep and not native.watched(u):
        y, last, _ = _outputs(given[0], given[2], interval, keep)
        engine.forward(*given, state, None, interval, y, last, None)
        return y, last
    docs = None if doc_ids is None else doc_ids.long().expand(u.shape[:2]).contiguous()
    y, last, _ = _forward(*given, state, docs, interval, keep, engine.__name__.rsplit(".", 1)[1])
    return y, last
