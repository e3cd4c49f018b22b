"""mamba-ssm: its CUDA selective scan, and its SSD kernel as a row of linear_attention."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from zoo.kernels import gpu
from zoo.kernels.libraries import problem, untraceable

SMALLEST_STEP = 1e-6
missing = functools.partial(problem, "mamba_ssm", "mamba-ssm", "2.2")


def constraints(op: str) -> dict:
    """What the `mamba_ssm` row of an op needs."""
    return {
        "priority": 15,
        "devices": ("cuda",),
        "dtypes": (torch.float32, torch.bfloat16),
        "missing": missing,
        "unfit": functools.partial(gpu.checked, op, "mamba_ssm"),
    }


def selective_scan_refuses(u, delta, A, B, C, initial_state, doc_ids, chunk_size) -> str | None:
    """Why mamba-ssm cannot do this call of selective_scan, or None."""
    if initial_state is not None or doc_ids is not None:
        return "starts from no state and knows no documents"
    return untraceable()


def selective_scan(u, delta, A, B, C, initial_state, doc_ids, chunk_size) -> tuple[Tensor, Tensor]:
    """selective_scan_fn, which runs over the last dimension: [B, E, T]."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    u, delta, B, C = (x.transpose(1, 2).contiguous() for x in (u, delta.to(u.dtype), B.to(u.dtype), C.to(u.dtype)))
    y, last = selective_scan_fn(u, delta, A.float(), B, C, delta_softplus=False, return_last_state=True)
    return y.transpose(1, 2), last


def ssd_refuses(q, k, v, log_decay, scale, initial_state, doc_ids, chunk_size) -> str | None:
    """Why SSD cannot do this call of linear_attention, or None."""
    if log_decay is None or log_decay.ndim != 3:
        return "SSD needs a decay per head and token"
    return untraceable()


def ssd(q, k, v, log_decay, scale, initial_state, doc_ids, chunk_size) -> tuple[Tensor, Tensor]:
    """mamba_chunk_scan_combined computes h = exp(dt A) h + dt B x^T, y = C h. With A = -1, dt = -log_decay and
    x = v / dt it is our recurrence; a decay above exp(-1e-6) counts as that, since dt divides."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    dt = (-log_decay.float()).clamp(min=SMALLEST_STEP)
    A = torch.full((v.shape[2],), -1.0, device=v.device)
    state = None if initial_state is None else initial_state.float().transpose(-1, -2).contiguous()
    y, last = mamba_chunk_scan_combined(
        (v / dt[..., None]).to(v.dtype), dt, A, k.to(v.dtype), (q * scale).to(v.dtype), max(chunk_size, 64),
        initial_states=state, seq_idx=_numbered(doc_ids), return_final_states=True,
    )  # fmt: skip
    return y, last.transpose(-1, -2).float()


def _numbered(doc_ids: Tensor | None) -> Tensor | None:
    """Document numbers from 0 on, int32, as SSD compares them with the token before."""
    if doc_ids is None:
        return None
    new = torch.zeros_like(doc_ids, dtype=torch.int32)
    new[:, 1:] = doc_ids[:, 1:] != doc_ids[:, :-1]
    return new.cumsum(1, dtype=torch.int32)
