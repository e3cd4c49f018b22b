"""The gated delta rule by the C core (native.c): token by token, a saved state before every 32 for backward."""

from __future__ import annotations

import sys

from torch import Tensor

from zoo.kernels import native
from zoo.kernels.chunking import wide
from zoo.kernels.delta_rule import fused

_INTERVAL = 32  # tokens whose states backward rebuilds at once: they should fit the second-level cache


def refuse(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, scale: float,
    initial_state: Tensor | None, doc_ids: Tensor | None, chunk_size: int,
) -> str | None:  # fmt: skip
    """Why the core should not do this call, or None."""
    return native.untraceable() or native.better_fused(v.shape[1])


def _sizes(q: Tensor, v: Tensor, log_decay: Tensor | None) -> tuple[int, ...]:
    """B, T, H, G, Dk, Dv and the kind of decay."""
    return *v.shape[:3], *q.shape[2:], v.shape[3], 0 if log_decay is None else log_decay.ndim - 2


def forward(q, k, v, beta, log_decay, initial_state, doc_ids, scale, interval, o, final, states) -> None:
    """Fill o, final and (unless None) states; everything contiguous and of one dtype."""
    native.run(
        "delta_rule", "forward", q.dtype, q, k, v, beta, log_decay, initial_state, doc_ids, o, final, states,
        *_sizes(q, v, log_decay), interval, scale,
    )  # fmt: skip


def backward(grad_o, grad_final, q, k, v, beta, log_decay, doc_ids, states, scale, interval) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, beta, log_decay and the initial state."""
    sizes = B, T, H, G, Dk, Dv, _ = _sizes(q, v, log_decay)
    dq, dk = q.new_empty(B, T, H, Dk), q.new_empty(B, T, H, Dk)
    dv, dbeta, ds = v.new_empty(v.shape), beta.new_empty(beta.shape), v.new_empty(B, H, Dk, Dv)
    dg = v.new_empty(0 if log_decay is None else log_decay.shape)
    native.run(
        "delta_rule", "backward", q.dtype, grad_o, grad_final, q, k, v, beta, log_decay, doc_ids, states,
        dq, dk, dv, dbeta, dg, ds, *sizes, interval, scale,
    )  # fmt: skip
    if G < H:
        dq, dk = (x.unflatten(2, (G, H // G)).sum(3) for x in (dq, dk))
    return dq, dk, dv, dbeta, dg, ds


def step(q, k, v, beta, log_decay, initial_state, scale) -> tuple[Tensor, Tensor]:
    """Output and state after one token."""
    B, _, H, _, Dk, Dv, _ = _sizes(q, v, log_decay)
    o, final = v.new_empty(v.shape), v.new_empty(B, H, Dk, Dv)
    forward(q, k, v, beta, log_decay, initial_state, None, scale, 1, o, final, None)
    return o, final


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, scale: float,
    initial_state: Tensor | None, doc_ids: Tensor | None, chunk_size: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `zoo.kernels.delta_rule.delta_rule`."""
    dtype = wide(v.dtype)
    o, final = fused.delta_rule(
        q.to(dtype), k.to(dtype), v.to(dtype), beta, log_decay, scale, initial_state, doc_ids, chunk_size, _INTERVAL,
        sys.modules[__name__],
    )  # fmt: skip
    return o.to(v.dtype), final
