"""Diagonal linear recurrence h_t = exp(log_decay_t) * h_{t-1} + inputs_t, real or complex: S5, LRU, HGRN, GateLoop."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from zoo import row
from zoo.kernels import gpu, slices
from zoo.kernels import native as native_core
from zoo.kernels.diagonal_scan import chunked, native, reference
from zoo.kernels.diagonal_scan.cost import flops
from zoo.kernels.dispatch import call, register_row

__all__ = ["diagonal_scan", "flops"]

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64, torch.complex128)

gpu.register_triton_row(
    "diagonal_scan", "zoo.kernels.diagonal_scan.triton:diagonal_scan", refuse=native.refuse_on_gpu,
    dtypes=(torch.float32, torch.bfloat16, torch.float16, torch.complex64),
)  # fmt: skip
register_row(
    "diagonal_scan", "native", native.diagonal_scan, priority=20, devices=("cpu",), dtypes=_DTYPES,
    missing=functools.partial(native_core.missing, "diagonal_scan"), refuse=native.refuse,
)  # fmt: skip
register_row("diagonal_scan", "chunked", chunked.diagonal_scan, priority=10, dtypes=_DTYPES)
register_row("diagonal_scan", "reference", reference.diagonal_scan, priority=0, dtypes=_DTYPES)


def diagonal_scan(
    log_decay: Tensor,
    inputs: Tensor,
    *,
    initial_state: Tensor | None = None,
    doc_ids: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Scan h_t = exp(log_decay_t) * h_{t-1} + inputs_t, elementwise over any trailing shape.

    inputs: [B, T, ...]; log_decay: broadcasts to inputs, real or complex, real part <= 0 (-inf forgets all);
    initial_state: [B, ...] (zeros where None), it belongs to the first document of its row; doc_ids: [B, T].
    Returns h [B, T, ...] in the dtype of inputs (complex where log_decay is) and the last state [B, ...] in
    float32, float64 where an argument is double, or the complex type of that width.
    """

    def run(initial_state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return call("diagonal_scan", backend, log_decay, inputs, initial_state, doc_ids)

    if (part := row.current()) is not None:
        return slices.diagonal_scan(part, run, log_decay, inputs, initial_state, doc_ids)
    return run(initial_state)
