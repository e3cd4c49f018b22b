"""Diagonal plus low-rank recurrence as one opaque operator with gradients, computed by an engine (see native.py).

An engine has `forward`, `backward` and `step`. Forward saves the state before every `interval` tokens; backward
rebuilds everything else from them.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.kernels import higher
from zoo.kernels.chunking import wide
from zoo.kernels.dplr import chunked
from zoo.kernels.dplr.cost import flops


def _engine(name: str) -> ModuleType:
    return importlib.import_module(f"zoo.kernels.dplr.{name}")


@torch.library.custom_op("zoo::dplr", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, log_decay: Tensor, initial_state: Tensor | None,
    doc_ids: Tensor | None, scale: float, chunk_size: int, interval: int, keep: bool, engine: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    o, final, states = _outputs(q, v, interval, keep)
    _engine(engine).forward(
        q, k, v, a, b, log_decay, initial_state, doc_ids, scale, interval, o, final, states if keep else None
    )
    return o, final, states


def _outputs(q: Tensor, v: Tensor, interval: int, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    (B, T, H, Dv), Dk = v.shape, q.shape[3]
    count = -(-T // interval) if keep else 0
    final = v.new_empty(B, H, Dk, Dv, dtype=wide(v.dtype))
    return v.new_empty(v.shape), final, final.new_empty(B, count, H, Dk, Dv)


@_forward.register_fake
def _(q, k, v, a, b, log_decay, initial_state, doc_ids, scale, chunk_size, interval, keep, engine):
    return _outputs(q, v, interval, keep)


@torch.library.custom_op("zoo::dplr_backward", mutates_args=())
def _backward(
    grad_o: Tensor, grad_final: Tensor | None, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor,
    log_decay: Tensor, doc_ids: Tensor | None, states: Tensor, scale: float, chunk_size: int, interval: int,
    engine: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, a, b, log_decay and the initial state."""
    return _engine(engine).backward(
        grad_o.contiguous(), None if grad_final is None else grad_final.contiguous(), q, k, v, a, b, log_decay,
        doc_ids, states, scale, interval,
    )  # fmt: skip


@_backward.register_fake
def _(grad_o, grad_final, q, k, v, a, b, log_decay, doc_ids, states, scale, chunk_size, interval, engine):
    B, _, H, Dv = v.shape
    return *(x.new_empty(x.shape) for x in (q, k, v, a, b, log_decay)), states.new_empty(B, H, q.shape[3], Dv)


def _keep(ctx, inputs, output) -> None:
    *given, initial_state, doc_ids, ctx.scale, ctx.chunk_size, ctx.interval, _, ctx.engine = inputs
    ctx.save_for_backward(*given, initial_state, doc_ids, output[2])
    ctx.set_materialize_grads(False)


def _gradient(ctx, grad_o, grad_final, _):
    *given, initial, doc_ids, states = ctx.saved_tensors
    options = (None,) * 6  # documents, scale, ...
    if higher.wanted():

        def again(q, k, v, a, b, g, s):
            return chunked.dplr(q, k, v, a, b, g, ctx.scale, s, doc_ids, ctx.chunk_size)

        return *higher.gradients(again, (*given, initial), (grad_o, grad_final)), *options
    if grad_o is None:
        grad_o = torch.zeros_like(given[2])
    *grads, ds = _backward(
        grad_o, grad_final, *given, doc_ids, states, ctx.scale, ctx.chunk_size, ctx.interval, ctx.engine
    )
    return *grads, None if initial is None else ds, *options


_forward.register_autograd(_gradient, setup_context=_keep)


@register_flop_formula(torch.ops.zoo.dplr)
def _(q, k, v, a, b, log_decay, initial_state, doc_ids, scale, chunk_size, *args, **kwargs) -> int:
    return flops(*q, value_dim=v[3], chunk_size=chunk_size)


@register_flop_formula(torch.ops.zoo.dplr_backward)
def _(grad_o, grad_final, q, k, v, a, b, log_decay, doc_ids, states, scale, chunk_size, *args, **kwargs) -> int:
    # the forward pass again, and two products for each of its products
    return flops(*q, value_dim=v[3], chunk_size=chunk_size) * 3


@torch.library.custom_op("zoo::dplr_step", mutates_args=())
def _step(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, log_decay: Tensor, initial_state: Tensor | None,
    scale: float, engine: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _engine(engine).step(q, k, v, a, b, log_decay, initial_state, scale)


@_step.register_fake
def _(q, k, v, a, b, log_decay, initial_state, scale, engine):
    return _outputs(q, v, 1, False)[:2]


@register_flop_formula(torch.ops.zoo.dplr_step)
def _(q, k, v, *args, **kwargs) -> int:
    return flops(*q, value_dim=v[3])


def dplr(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, log_decay: Tensor, scale: float,
    initial_state: Tensor | None, doc_ids: Tensor | None, chunk_size: int, interval: int, engine: ModuleType,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Run an engine; its name is the last part of its module's."""
    state_dtype, name = wide(v.dtype), engine.__name__.rsplit(".", 1)[1]
    g = log_decay.to(state_dtype)
    given = tuple(x.contiguous() for x in (q, k, v, a, b, g))
    s = None if initial_state is None else initial_state.to(state_dtype).contiguous()
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*given, s))
    if v.shape[1] == 1 and not keep:
        return _step(*given, s, scale, name) if _watched(q) else engine.step(*given, s, scale)
    docs = None if doc_ids is None else doc_ids.long().expand(v.shape[:2]).contiguous()
    o, final, _ = _forward(*given, s, docs, scale, chunk_size, interval, keep, name)
    return o, final


def _watched(x: Tensor) -> bool:
    """Does anything trace, count or fake operators? Else a step goes without the dispatcher, whose cost is above its
    own."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0 or type(x) is not Tensor
