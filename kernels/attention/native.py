"""Attention by the C core, as one opaque operator with gradients: exact masks of every kind, no tile computed in
which nothing is visible, memory linear in the length."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.kernels import higher, native
from zoo.kernels.attention import chunked
from zoo.kernels.attention.cost import attention_flops
from zoo.kernels.attention.mask import Mask

_KEYS = 64  # keys of a tile of the core
_FEW = 16  # queries: fewer read keys and values where they lie
_PART = 256  # keys worth a thread of their own


def refuse(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, softcap: float | None,
    sink_logits: Tensor | None, need_lse: bool,
) -> str | None:  # fmt: skip
    """Why the core should not do this call, or None."""
    if not q.dtype == k.dtype == v.dtype:
        return "needs one dtype"
    if q.shape[1] < _FEW and native.watched(q, k, v, sink_logits):
        return f"laying out the keys costs more than {q.shape[1]} queries save"
    return native.untraceable()


def _up(n: int, to: int) -> int:
    return -(-n // to) * to


def _sizes(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, ...]:
    return *q.shape[:2], k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3]


@torch.library.custom_op("zoo::attention", mutates_args=(), device_types="cpu")
def _forward(
    q: Tensor, k: Tensor, v: Tensor, q_index: Tensor | None, k_index: Tensor | None, q_doc_ids: Tensor | None,
    k_doc_ids: Tensor | None, sink_logits: Tensor | None, causal: bool, window: int, sinks: int, scale: float,
    softcap: float, fused: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    (B, T, S, H, G, D, Dv), lanes = _sizes(q, k, v), 64 // q.element_size()
    o, lse = q.new_empty(B, T, H, Dv), q.new_empty(B, T, H)
    scratch = q.new_empty(B * G * (D * _up(S, _KEYS) + S * _up(Dv, lanes)))
    native.run(
        "attention", "forward", q.dtype, q, k, v, q_index, k_index, q_doc_ids, k_doc_ids, sink_logits, o, lse, scratch,
        B, T, S, H, G, D, Dv, causal, window, sinks, scale, softcap,
    )  # fmt: skip
    return o, lse


@_forward.register_fake
def _(q, k, v, *rest):
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3])


@torch.library.custom_op("zoo::attention_backward", mutates_args=(), device_types="cpu")
def _backward(
    grad_o: Tensor, grad_lse: Tensor | None, o: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor,
    q_index: Tensor | None, k_index: Tensor | None, q_doc_ids: Tensor | None, k_doc_ids: Tensor | None,
    sink_logits: Tensor | None, causal: bool, window: int, sinks: int, scale: float, softcap: float, fused: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    B, _, S, H, G, D, Dv = sizes = _sizes(q, k, v)
    lanes = 64 // q.element_size()
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    dsink = q.new_zeros(B, H)
    scratch = q.new_empty(B * G * _up(S, _KEYS) * (D + Dv + 2 * _up(D, lanes) + _up(Dv, lanes)))
    native.run(
        "attention", "backward", q.dtype, q, k, v, o, lse, grad_o.contiguous(),
        None if grad_lse is None else grad_lse.contiguous(), q_index, k_index, q_doc_ids, k_doc_ids, sink_logits,
        dq, dk, dv, dsink, scratch, *sizes, causal, window, sinks, scale, softcap,
    )  # fmt: skip
    return dq, dk, dv, dsink.sum(0)


@_backward.register_fake
def _(grad_o, grad_lse, o, lse, q, k, v, *rest):
    return *(x.new_empty(x.shape) for x in (q, k, v)), q.new_empty(q.shape[2])


def _keep(ctx, inputs, output) -> None:
    tensors, ctx.options = inputs[:8], inputs[8:]
    ctx.save_for_backward(*output, *tensors)
    ctx.set_materialize_grads(False)


def _gradient(ctx, grad_o, grad_lse):
    o, lse, q, k, v, *rest = ctx.saved_tensors
    if higher.wanted():
        causal, window, sinks, scale, softcap, _ = ctx.options
        mask = Mask(causal, window or None, sinks, *rest[:4])

        def again(q, k, v, sink):
            return chunked.attention(q, k, v, mask, scale, softcap or None, sink, True)

        *grads, sink = higher.gradients(again, (q, k, v, rest[-1]), (grad_o, grad_lse))
        return *grads, None, None, None, None, sink, *[None] * len(ctx.options)
    grad_o = torch.zeros_like(o) if grad_o is None else grad_o
    dq, dk, dv, dsink = _backward(grad_o, grad_lse, o, lse, q, k, v, *rest, *ctx.options)
    sink = None if rest[-1] is None else dsink
    return dq, dk, dv, None, None, None, None, sink, *[None] * len(ctx.options)


_forward.register_autograd(_gradient, setup_context=_keep)


def _flops(q, k, v, q_index, causal, window, sinks, fused) -> int:
    return attention_flops(
        q[0], q[1], k[1], q[2], q[3], v[3], causal=causal, window=window or None, sinks=sinks,
        plain=q_index is None, fused=fused,
    )  # fmt: skip


@register_flop_formula(torch.ops.zoo.attention)
def _(q, k, v, q_index, ki, qd, kd, sink, causal, window, sinks, scale, softcap, fused, *args, **kwargs) -> int:
    return _flops(q, k, v, q_index, causal, window, sinks, fused)


@register_flop_formula(torch.ops.zoo.attention_backward)
def _(
    grad_o, grad_lse, o, lse, q, k, v, q_index, ki, qd, kd, sink, causal, window, sinks, scale, softcap, fused,
    *args, **kwargs,
) -> int:  # fmt: skip
    # scores again, and the gradients of p, v, q and k
    return _flops(q, k, v, q_index, causal, window, sinks, fused) * 5 // 2


def _orders(q: Tensor, k: Tensor, mask: Mask) -> list[Tensor | None]:
    """Order indices and documents of queries and keys."""
    (B, T), S = q.shape[:2], k.shape[1]
    return [None if x is None else x.long().expand(B, n).contiguous() for x, n in zip(mask[3:], (T, S, T, S))]


def _sink(q: Tensor, sink_logits: Tensor | None) -> Tensor | None:
    return None if sink_logits is None else sink_logits.to(q.dtype).contiguous()


def _few(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, softcap: float | None, sink_logits: Tensor | None
) -> tuple[Tensor, Tensor]:
    """A few queries without gradients; keys and values are read where they lie."""
    B, T, S, H, G, D, Dv = _sizes(q, k, v)
    k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (k, v))
    parts = max(1, min(-(-torch.get_num_threads() // max(B, 1)), S // _PART))
    o, lse, scratch = q.new_empty(B, T, H, Dv), q.new_empty(B, T, H), q.new_empty(B * parts * T * H * (Dv + 2))
    native.run(
        "attention", "few", q.dtype, q.contiguous(), k, v, *_orders(q, k, mask), _sink(q, sink_logits), o, lse, scratch,
        parts, *k.stride()[:3], *v.stride()[:3], B, T, S, H, G, D, Dv, mask.causal, mask.window or 0, mask.sinks, scale,
        softcap or 0.0,
    )  # fmt: skip
    return o, lse


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, softcap: float | None,
    sink_logits: Tensor | None, need_lse: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """See `zoo.kernels.attention.attention`."""
    if q.shape[1] < _FEW and not native.watched(q, k, v, sink_logits):
        o, lse = _few(q, k, v, mask, scale, softcap, sink_logits)
        return o, lse if need_lse else None
    fused = softcap is None and sink_logits is None and not need_lse  # what is counted, see cost.py
    o, lse = _forward(
        q.contiguous(), k.contiguous(), v.contiguous(), *_orders(q, k, mask), _sink(q, sink_logits),
        mask.causal, mask.window or 0, mask.sinks, scale, softcap or 0.0, fused,
    )  # fmt: skip
    return o, lse if need_lse else None
