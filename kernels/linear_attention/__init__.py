"""Linear attention with no decay, a decay per head or a decay per key channel."""

from __future__ import annotations

import functools

from torch import Tensor

from zoo import row
from zoo.kernels import fla, gpu, mamba_ssm, slices
from zoo.kernels import native as native_core
from zoo.kernels.chunking import check_heads, wide
from zoo.kernels.dispatch import call, register_row
from zoo.kernels.linear_attention import chunked, native, reference
from zoo.kernels.linear_attention.cost import INTERVAL, flops

__all__ = ["INTERVAL", "flops", "linear_attention"]

register_row(
    "linear_attention", "fla", fla.linear_attention,
    refuse=fla.linear_attention_refuses, **fla.constraints("linear_attention"),
)  # fmt: skip
register_row(
    "linear_attention", "mamba_ssm", mamba_ssm.ssd,
    refuse=mamba_ssm.ssd_refuses, **mamba_ssm.constraints("linear_attention"),
)  # fmt: skip
gpu.register_triton_row(
    "linear_attention", "zoo.kernels.linear_attention.triton:linear_attention", refuse=native.refuse
)
register_row(
    "linear_attention", "native", native.linear_attention, priority=20, devices=("cpu",),
    missing=functools.partial(native_core.missing, "linear_attention"), refuse=native.refuse,
)  # fmt: skip
register_row("linear_attention", "chunked", chunked.linear_attention, priority=10)
register_row("linear_attention", "reference", reference.linear_attention, priority=0)


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    doc_ids: Tensor | None = None,
    chunk_size: int = 64,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """S_t = exp(g_t) * S_{t-1} + k_t v_t^T;  o_t = scale * S_t^T q_t (the token is written, then read).

    q, k: [B, T, Hq, Dk]; v: [B, T, H, Dv], head h uses q and k of head h // (H / Hq); log_decay: None, [H]
    constant, [B, T, H] or [B, T, H, Dk], finite and <= 0; initial_state: [B, H, Dk, Dv]; doc_ids: [B, T], a new
    document starts from a zero state (the first one from initial_state). Returns o [B, T, H, Dv] in v's dtype
    and the final state [B, H, Dk, Dv] in float32 (float64 for float64). chunk_size changes speed only.
    """
    check_heads("linear_attention", q, k, v)
    if log_decay is not None and log_decay.ndim not in (1, 3, 4):
        raise ValueError(f"log_decay must be [H], [B, T, H] or [B, T, H, Dk], got {list(log_decay.shape)}")
    if v.shape[1] == 0:
        shape, dtype = (v.shape[0], v.shape[2], k.shape[3], v.shape[3]), wide(v.dtype)
        return v.new_empty(v.shape), v.new_zeros(shape, dtype=dtype) + (0 if initial_state is None else initial_state)

    def run(initial_state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return call("linear_attention", backend, q, k, v, log_decay, scale, initial_state, doc_ids, chunk_size)

    if (part := row.current()) is not None:
        return slices.linear_attention(part, run, q, v, log_decay, scale, initial_state, doc_ids)
    return run(initial_state)
