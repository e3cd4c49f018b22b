"""Diagonal plus low-rank recurrence by the C core (native.c): token by token, a saved state before every 32 for
backward."""

from __future__ import annotations

import sys

from torch import Tensor

from zoo.kernels import native
from zoo.kernels.chunking import wide
from zoo.kernels.dplr import fused

_INTERVAL = 32  # tokens whose states backward rebuilds at once: they should fit the second-level cache


def refuse(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, log_decay: Tensor, scale: float,
    initial_state: Tensor | None, doc_ids: Tensor | None, chunk_size: int,
) -> str | None:  # fmt: skip
    """Why the core should not do this call, or None."""
    return native.untraceable()


def _sizes(q: Tensor, v: Tensor) -> tuple[int, ...]:
    """B, T, H, Dk, Dv."""
    return *q.shape, v.shape[3]


def forward(q, k, v, a, b, log_decay, initial_state, doc_ids, scale, interval, o, final, states) -> None:
    """Fill o, final and (unless None) states; everything contiguous and of one dtype."""
    native.run(
        "dplr", "forward", q.dtype, q, k, v, a, b, log_decay, initial_state, doc_ids, o, final, states,
        *_sizes(q, v), interval, scale,
    )  # fmt: skip


def backward(grad_o, grad_final, q, k, v, a, b, log_decay, doc_ids, states, scale, interval) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, a, b, log_decay and the initial state."""
    B, _, H, Dk, Dv = sizes = _sizes(q, v)
    grads = (*(x.new_empty(x.shape) for x in (q, k, v, a, b, log_decay)), v.new_empty(B, H, Dk, Dv))
    native.run(
        "dplr", "backward", q.dtype, grad_o, grad_final, q, k, v, a, b, log_decay, doc_ids, states, *grads,
        *sizes, interval, scale,
    )  # fmt: skip
    return grads


def step(q, k, v, a, b, log_decay, initial_state, scale) -> tuple[Tensor, Tensor]:
    """Output and state after one token."""
    B, _, H, Dk, Dv = _sizes(q, v)
    o, final = v.new_empty(v.shape), v.new_empty(B, H, Dk, Dv)
    forward(q, k, v, a, b, log_decay, initial_state, None, scale, 1, o, final, None)
    return o, final


def dplr(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, log_decay: Tensor, scale: float,
    initial_state: Tensor | None, doc_ids: Tensor | None, chunk_size: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `zoo.kernels.dplr.dplr`."""
    dtype = wide(v.dtype)
    q, k, a, b = (x.to(dtype) for x in (q, k, a, b))
    o, final = fused.dplr(
        q, k, v.to(dtype), a, b, log_decay, scale, initial_state, doc_ids, chunk_size, _INTERVAL, sys.modules[__name__]
    )
    return o.to(v.dtype), final
