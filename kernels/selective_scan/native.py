"""The selective scan by the C core (native.c): a vector of channels at a time, a saved state before every 64 tokens."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from zoo.kernels import native
from zoo.kernels.chunking import wide
from zoo.kernels.selective_scan import fused
from zoo.kernels.selective_scan.cost import INTERVAL


def refuse(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None, doc_ids: Tensor | None,
    chunk_size: int,
) -> str | None:  # fmt: skip
    """Why the core should not do this call, or None."""
    return native.untraceable()


def forward(u, delta, A, B, C, initial_state, doc_ids, interval, y, last, states) -> None:
    """Fill y, last and (unless None) states; everything contiguous and of one dtype."""
    native.run(
        "selective_scan", "forward", u.dtype, u, delta, A, B, C, initial_state, doc_ids, y, last, states,
        *u.shape, A.shape[1], interval,
    )  # fmt: skip


def backward(dy, dlast, u, delta, A, B, C, doc_ids, states, interval) -> tuple[Tensor, ...]:
    """Gradients of u, delta, A, B, C and the initial state."""
    batch, N = u.shape[0], A.shape[1]
    # several tasks to a row only where there are fewer rows than threads
    parts = max(1, -(-torch.get_num_threads() // batch)) if batch else 1
    du, ddelta = u.new_empty(u.shape), u.new_empty(u.shape)
    dA, dh = A.new_empty(batch, *A.shape), A.new_empty(batch, *A.shape)
    dB, dC = B.new_empty(parts, *B.shape), C.new_empty(parts, *C.shape)
    native.run(
        "selective_scan", "backward", u.dtype, dy, dlast, u, delta, A, B, C, doc_ids, states, du, ddelta, dA, dB, dC,
        dh, *u.shape, N, interval, parts,
    )  # fmt: skip
    return du, ddelta, dA.sum(0), dB.sum(0), dC.sum(0), dh


def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None, doc_ids: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `zoo.kernels.selective_scan.selective_scan`."""
    dtype = wide(u.dtype)
    u, delta, A, B, C = (x.to(dtype) for x in (u, delta, A, B, C))
    return fused.selective_scan(u, delta, A, B, C, initial_state, doc_ids, INTERVAL, sys.modules[__name__])
