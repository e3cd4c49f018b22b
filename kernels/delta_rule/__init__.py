"""Delta rule with no decay, a decay per head or a decay per key channel."""

from __future__ import annotations

import functools

from torch import Tensor

from zoo import row
from zoo.kernels import fla, gpu, slices
from zoo.kernels import native as native_core
from zoo.kernels.chunking import check_heads
from zoo.kernels.delta_rule import chunked, native, reference
from zoo.kernels.delta_rule.cost import flops
from zoo.kernels.dispatch import call, register_row

__all__ = ["delta_rule", "flops"]


def _triton_refuses(q: Tensor, k: Tensor, v: Tensor, *options) -> str | None:
    """Why the Triton kernels should not do this call, or None."""
    if q.shape[3] * v.element_size() > 512:
        return "keys of more than 512 bytes: their states do not fit the registers"
    return native_core.untraceable()


register_row("delta_rule", "fla", fla.delta_rule, refuse=fla.delta_rule_refuses, **fla.constraints("delta_rule"))
# below fla's chunked kernels, above the chunked torch form
gpu.register_triton_row("delta_rule", "zoo.kernels.delta_rule.triton:delta_rule", priority=15, refuse=_triton_refuses)
register_row(
    "delta_rule", "native", native.delta_rule, priority=20, devices=("cpu",),
    missing=functools.partial(native_core.missing, "delta_rule"), refuse=native.refuse,
)  # fmt: skip
register_row("delta_rule", "chunked", chunked.delta_rule, priority=10)
register_row("delta_rule", "reference", reference.delta_rule, priority=0)


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    doc_ids: Tensor | None = None,
    chunk_size: int = 64,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """S' = exp(g_t) * S_{t-1};  S_t = S' + beta_t k_t (v_t - S'^T k_t)^T;  o_t = scale * S_t^T q_t.

    q, k: [B, T, Hq, Dk]; v: [B, T, H, Dv], head h uses q and k of head h // (H / Hq); beta: [B, T, H];
    log_decay: None, [B, T, H] or [B, T, H, Dk], finite and <= 0; initial_state: [B, H, Dk, Dv]; doc_ids: [B, T],
    a new document starts from a zero state (the first one from initial_state). Returns o [B, T, H, Dv] in v's
    dtype and the final state [B, H, Dk, Dv] in float32 (float64 for float64). chunk_size changes speed only.
    Stable where beta |k|^2 <= 2: give normalised keys.
    """
    check_heads("delta_rule", q, k, v)
    if beta.shape != v.shape[:3]:
        raise ValueError(f"delta_rule: beta must be [B, T, H] = {list(v.shape[:3])}, got {list(beta.shape)}")
    if log_decay is not None and log_decay.shape[:3] != v.shape[:3]:
        raise ValueError(f"delta_rule: log_decay must be [B, T, H] or [B, T, H, Dk], got {list(log_decay.shape)}")

    def run(v: Tensor, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
        return call("delta_rule", backend, q, k, v, beta, log_decay, scale, initial_state, doc_ids, chunk_size)

    if (part := row.current()) is not None:
        return slices.matrix_recurrence(part, run, v, k.shape[-1], initial_state, doc_ids)
    return run(v, initial_state)
