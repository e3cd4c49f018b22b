"""Linear attention by the C core (native.c): blocks of 16 tokens, a saved state before every 64 for backward."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from zoo.kernels import native
from zoo.kernels.chunking import wide
from zoo.kernels.linear_attention import fused
from zoo.kernels.linear_attention.cost import INTERVAL


def refuse(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, scale: float, initial_state: Tensor | None,
    doc_ids: Tensor | None, chunk_size: int,
) -> str | None:  # fmt: skip
    """Why the core should not do this call, or None."""
    return native.untraceable() or native.better_fused(v.shape[1])


def _sizes(q: Tensor, v: Tensor) -> tuple[int, ...]:
    (B, T, H, Dv), (G, Dk) = v.shape, q.shape[2:]
    return B, T, H, G, Dk, Dv


def _kind(log_decay: Tensor | None) -> int:
    return 0 if log_decay is None else {1: 1, 3: 2, 4: 3}[log_decay.ndim]


def _parts(q: Tensor, v: Tensor) -> int:
    """Tasks that the heads of a group are cut into: one, where rows and groups are enough for all threads."""
    groups, heads = q.shape[0] * q.shape[2], v.shape[2] // q.shape[2]
    return max(1, min(heads, -(-torch.get_num_threads() // max(groups, 1))))


def forward(q, k, v, log_decay, initial_state, doc_ids, scale, interval, o, final, states) -> None:
    """Fill o, final and (unless None) states; everything contiguous and of one dtype."""
    native.run(
        "linear_attention", "forward", q.dtype, q, k, v, log_decay, initial_state, doc_ids, o, final, states,
        *_sizes(q, v), _kind(log_decay), interval, _parts(q, v), scale,
    )  # fmt: skip


def backward(grad_o, grad_final, q, k, v, log_decay, doc_ids, states, scale, interval) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, log_decay and the initial state."""
    (B, T, H, G, Dk, Dv), kind, parts = _sizes(q, v), _kind(log_decay), _parts(q, v)
    dq, dk = q.new_empty(parts, *q.shape), k.new_empty(parts, *k.shape)
    dv, ds = v.new_empty(v.shape), v.new_empty(B, H, Dk, Dv)
    dg = None if kind == 0 else v.new_empty(B, T, H, Dk) if kind == 3 else v.new_empty(B, T, H)
    native.run(
        "linear_attention", "backward", q.dtype, grad_o, grad_final, q, k, v, log_decay, doc_ids, states,
        dq, dk, dv, dg, ds, B, T, H, G, Dk, Dv, kind, interval, parts, scale,
    )  # fmt: skip
    dq, dk = (x[0] if parts == 1 else x.sum(0) for x in (dq, dk))
    dg = v.new_empty(0) if dg is None else dg.sum((0, 1)) if kind == 1 else dg
    return dq, dk, dv, dg, ds


def step(q, k, v, log_decay, initial_state, scale) -> tuple[Tensor, Tensor]:
    """Output and state after one token."""
    B, _, H, G, Dk, Dv = _sizes(q, v)
    o, final = torch.empty_like(v), v.new_empty(B, H, Dk, Dv)
    native.run(
        "linear_attention", "step", q.dtype, q, k, v, log_decay, initial_state, o, final,
        B, H, G, Dk, Dv, _kind(log_decay), scale,
    )  # fmt: skip
    return o, final


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, scale: float, initial_state: Tensor | None,
    doc_ids: Tensor | None, chunk_size: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `zoo.kernels.linear_attention.linear_attention`."""
    dtype = wide(v.dtype)
    o, final = fused.linear_attention(
        q.to(dtype), k.to(dtype), v.to(dtype), log_decay, float(scale), initial_state, doc_ids, chunk_size, INTERVAL,
        sys.modules[__name__],
    )  # fmt: skip
    return o.to(v.dtype), final
