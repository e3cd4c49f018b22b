"""Diagonal plus low-rank recurrence: a decay per key channel, and what is read under `a` is written under `b`."""

from __future__ import annotations

import functools

from torch import Tensor

from zoo import row
from zoo.kernels import gpu, slices
from zoo.kernels import native as native_core
from zoo.kernels.dispatch import call, register_row
from zoo.kernels.dplr import chunked, native, reference
from zoo.kernels.dplr.cost import flops

__all__ = ["dplr", "flops"]

# above the chunked torch form, which a chunked kernel would beat on long sequences
gpu.register_triton_row("dplr", "zoo.kernels.dplr.triton:dplr", priority=15, refuse=native.refuse)
register_row(
    "dplr", "native", native.dplr, priority=20, devices=("cpu",),
    missing=functools.partial(native_core.missing, "dplr"), refuse=native.refuse,
)  # fmt: skip
register_row("dplr", "chunked", chunked.dplr, priority=10)
register_row("dplr", "reference", reference.dplr, priority=0)


def dplr(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor,
    *,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    doc_ids: Tensor | None = None,
    chunk_size: int = 64,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """S_t = (diag(exp(g_t)) + b_t a_t^T) S_{t-1} + k_t v_t^T;  o_t = scale * S_t^T q_t.

    q, k, a, b: [B, T, H, Dk]; v: [B, T, H, Dv]; log_decay: g [B, T, H, Dk], finite and <= 0; initial_state:
    [B, H, Dk, Dv]; doc_ids: [B, T], a new document starts from a zero state (the first one from initial_state).
    Returns o [B, T, H, Dv] in v's dtype and the final state [B, H, Dk, Dv] in float32 (float64 for float64).
    chunk_size changes speed only. a reads the state before the decay: the delta rule of key k, step beta and decay g
    is a = k * exp(g), b = -beta k, and beta k in place of k. Stable where the norm of each transition is at most 1.
    """
    if not q.shape == k.shape == a.shape == b.shape == log_decay.shape or q.shape[:3] != v.shape[:3]:
        shapes = ", ".join(str(list(x.shape)) for x in (q, k, v, a, b, log_decay))
        raise ValueError(
            f"dplr: q, k, a, b, log_decay must be [B, T, H, Dk] and v [B, T, H, Dv]; q, k, v, .. are {shapes}"
        )

    def run(v: Tensor, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
        return call("dplr", backend, q, k, v, a, b, log_decay, scale, initial_state, doc_ids, chunk_size)

    if (part := row.current()) is not None:
        return slices.matrix_recurrence(part, run, v, k.shape[-1], initial_state, doc_ids)
    return run(v, initial_state)
