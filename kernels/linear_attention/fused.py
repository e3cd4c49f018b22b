"""Linear attention as one opaque operator with gradients; the engine that computes it is a C core or Triton.

An engine has `forward`, `backward` and `step` (see native.py). Forward saves the state before every `interval`
tokens; backward rebuilds everything else from them.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.kernels import higher, native
from zoo.kernels.chunking import wide
from zoo.kernels.linear_attention import chunked
from zoo.kernels.linear_attention.cost import flops


def _engine(name: str) -> ModuleType:
    return importlib.import_module(f"zoo.kernels.linear_attention.{name}")


@torch.library.custom_op("zoo::linear_attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, initial_state: Tensor | None, doc_ids: Tensor | None,
    scale: float, chunk_size: int, interval: int, keep: bool, engine: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    o, final, states = _outputs(q, v, interval, keep)
    _engine(engine).forward(
        q, k, v, log_decay, initial_state, doc_ids, scale, interval, o, final, states if keep else None
    )
    return o, final, states


def _outputs(q: Tensor, v: Tensor, interval: int, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    (B, T, H, Dv), Dk = v.shape, q.shape[3]
    count = -(-T // interval) if keep else 0
    final = v.new_empty(B, H, Dk, Dv, dtype=wide(v.dtype))
    return v.new_empty(v.shape), final, final.new_empty(B, count, H, Dk, Dv)


@_forward.register_fake
def _(q, k, v, log_decay, initial_state, doc_ids, scale, chunk_size, interval, keep, engine):
    return _outputs(q, v, interval, keep)


@torch.library.custom_op("zoo::linear_attention_backward", mutates_args=())
def _backward(
    grad_o: Tensor, grad_final: Tensor | None, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None,
    doc_ids: Tensor | None, states: Tensor, scale: float, chunk_size: int, interval: int, engine: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, log_decay (empty without one) and the initial state."""
    grads = _engine(engine).backward(
        grad_o.contiguous(), None if grad_final is None else grad_final.contiguous(), q, k, v, log_decay, doc_ids,
        states, scale, interval,
    )  # fmt: skip
    return grads


@_backward.register_fake
def _(grad_o, grad_final, q, k, v, log_decay, doc_ids, states, scale, chunk_size, interval, engine):
    B, _, H, Dv = v.shape
    dg = states.new_empty(0 if log_decay is None else log_decay.shape)
    return *(x.new_empty(x.shape) for x in (q, k, v)), dg, states.new_empty(B, H, q.shape[3], Dv)


def _keep(ctx, inputs, output) -> None:
    q, k, v, log_decay, initial_state, doc_ids, *ctx.options, _, ctx.engine = inputs
    ctx.starts_somewhere = initial_state is not None
    ctx.save_for_backward(q, k, v, log_decay, doc_ids, output[2], initial_state)
    ctx.set_materialize_grads(False)


def _gradient(ctx, grad_o, grad_final, _):
    q, k, v, log_decay, doc_ids, states, initial = ctx.saved_tensors
    if higher.wanted():
        scale, chunk_size, _ = ctx.options

        def again(q, k, v, g, s):
            return chunked.linear_attention(q, k, v, g, scale, s, doc_ids, chunk_size)

        grads = higher.gradients(again, (q, k, v, log_decay, initial), (grad_o, grad_final))
        return *grads, None, None, None, None, None, None
    if grad_o is None:
        grad_o = torch.zeros_like(v)
    *grads, dg, ds = _backward(grad_o, grad_final, q, k, v, log_decay, doc_ids, states, *ctx.options, ctx.engine)
    dg, ds = None if log_decay is None else dg, ds if ctx.starts_somewhere else None
    return *grads, dg, ds, None, None, None, None, None, None


_forward.register_autograd(_gradient, setup_context=_keep)


def _flops(q: list[int], v: list[int], log_decay: list[int] | None, chunk_size: int) -> int:
    decay = "none" if log_decay is None else "channel" if len(log_decay) == 4 else "head"
    return flops(*v[:3], q[3], v[3], num_groups=q[2], chunk_size=chunk_size, decay=decay)


@register_flop_formula(torch.ops.zoo.linear_attention)
def _(q, k, v, log_decay, initial_state, doc_ids, scale, chunk_size, *args, **kwargs) -> int:
    return _flops(q, v, log_decay, chunk_size)


@register_flop_formula(torch.ops.zoo.linear_attention_backward)
def _(grad_o, grad_final, q, k, v, log_decay, doc_ids, states, scale, chunk_size, *args, **kwargs) -> int:
    # of n x n pairs and of products with a state there are five where forward has two
    return _flops(q, v, log_decay, chunk_size) * 5 // 2


@torch.library.custom_op("zoo::linear_attention_step", mutates_args=())
def _step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, initial_state: Tensor | None, scale: float, engine: str
) -> tuple[Tensor, Tensor]:
    return _engine(engine).step(q, k, v, log_decay, initial_state, scale)


@_step.register_fake
def _(q, k, v, log_decay, initial_state, scale, engine):
    return _outputs(q, v, 1, False)[:2]


@register_flop_formula(torch.ops.zoo.linear_attention_step)
def _(q, k, v, log_decay, *args, **kwargs) -> int:
    return _flops(q, v, log_decay, 1)


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, scale: float, initial_state: Tensor | None,
    doc_ids: Tensor | None, chunk_size: int, interval: int, engine: ModuleType,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Run an engine; its name is the last part of its module's."""
    state_dtype, name = wide(v.dtype), engine.__name__.rsplit(".", 1)[1]
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    g = None if log_decay is None else log_decay.to(state_dtype).contiguous()
    s = None if initial_state is None else initial_state.to(state_dtype).contiguous()
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, g, s))
    if v.shape[1] == 1 and not keep:
        if native.watched(q):
            return _step(q, k, v, g, s, scale, name)
        return engine.step(q, k, v, g, s, scale)
    docs = None if doc_ids is None else doc_ids.long().expand(v.shape[:2]).contiguous()
    o, final, _ = _forward(q, k, v, g, s, docs, scale, chunk_size, interval, keep, name)
    return o, final
