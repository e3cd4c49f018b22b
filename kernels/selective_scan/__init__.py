"""Selective scan of Mamba (S6): a diagonal state space whose step size, input and output maps depend on the token."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from zoo import row
from zoo.kernels import gpu, mamba_ssm, slices
from zoo.kernels import native as native_core
from zoo.kernels.chunking import wide
from zoo.kernels.dispatch import call, register_row
from zoo.kernels.selective_scan import chunked, native, reference
from zoo.kernels.selective_scan.cost import INTERVAL, flops

__all__ = ["INTERVAL", "flops", "selective_scan"]

register_row(
    "selective_scan", "mamba_ssm", mamba_ssm.selective_scan,
    refuse=mamba_ssm.selective_scan_refuses, **mamba_ssm.constraints("selective_scan"),
)  # fmt: skip
gpu.register_triton_row("selective_scan", "zoo.kernels.selective_scan.triton:selective_scan", refuse=native.refuse)
register_row(
    "selective_scan", "native", native.selective_scan, priority=20, devices=("cpu",),
    missing=functools.partial(native_core.missing, "selective_scan"), refuse=native.refuse,
)  # fmt: skip
register_row("selective_scan", "chunked", chunked.selective_scan, priority=10)
register_row("selective_scan", "reference", reference.selective_scan, priority=0)


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    doc_ids: Tensor | None = None,
    chunk_size: int = 16,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """h_t = exp(delta_t A) * h_{t-1} + (delta_t u_t) B_t, y_t = h_t C_t + D * u_t.

    u: [B, T, E]; delta: [B, T, E] >= 0 (softplus already applied); A: [E, N] <= 0; B, C: [B, T, N], shared by all
    channels; D: [E]; initial_state: [B, E, N] (zeros where None), it belongs to the first document of its row;
    doc_ids: [B, T]. Returns y [B, T, E] in the dtype of u and the last state [B, E, N], float32 (float64 for
    double). No form holds [B, T, E, N]: backward keeps one state per `chunk_size` tokens (64 in the C core, 16 in
    Triton).
    """
    if u.shape[1] == 0:
        shape, dtype = (u.shape[0], *A.shape), wide(u.dtype)
        return u.new_empty(u.shape), u.new_zeros(shape, dtype=dtype) + (0 if initial_state is None else initial_state)

    def run(initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
        return call("selective_scan", backend, u, delta, A, B, C, initial_state, doc_ids, chunk_size)

    if (part := row.current()) is not None:
        y, state = slices.selective_scan(part, run, delta, A, initial_state, doc_ids)
    else:
        y, state = run(initial_state)
    return (y if D is None else torch.addcmul(y, D, u)).to(u.dtype), state
