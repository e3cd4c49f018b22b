"""The diagonal scan by the C core (native.c)."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels import native
from zoo.kernels.diagonal_scan import chunked, fused


def refuse(log_decay: Tensor, inputs: Tensor, initial_state: Tensor | None, doc_ids: Tensor | None) -> str | None:
    """Why the core should not do this call, or None."""
    return native.untraceable()


def refuse_on_gpu(
    log_decay: Tensor, inputs: Tensor, initial_state: Tensor | None, doc_ids: Tensor | None
) -> str | None:
    """Why the Triton kernels cannot do this call, or None."""
    wide = torch.promote_types(log_decay.dtype, inputs.dtype)
    if wide in (torch.float64, torch.complex128):
        return "computes in float32"
    return native.untraceable()


def _real(x: Tensor | None) -> Tensor | None:
    return torch.view_as_real(x) if x is not None and x.is_complex() else x


def forward(a: Tensor, x: Tensor, initial_state: Tensor | None) -> Tensor:
    """h [B, T, D]; everything contiguous and of one dtype, float or complex."""
    h, real = x.new_empty(x.shape), x.real.dtype
    parts = (_real(y) for y in (a, x, initial_state, h))
    native.run("diagonal_scan", "forward", real, *parts, *x.shape, x.is_complex())
    return h


def backward(dh: Tensor, a: Tensor, h: Tensor, initial_state: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a, x and the initial state."""
    da, dx, dstate = a.new_empty(a.shape), h.new_empty(h.shape), h.new_empty(h.shape[0], h.shape[2])
    parts = (_real(y) for y in (dh.resolve_conj(), a, h, initial_state, dx, da, dstate))
    native.run("diagonal_scan", "backward", h.real.dtype, *parts, *h.shape, h.is_complex())
    return da, dx, dstate


def step(log_decay: Tensor, inputs: Tensor, initial_state: Tensor) -> tuple[Tensor, Tensor]:
    """One token by the equation itself: that is quicker than to call anything."""
    decay, wide = chunked.multipliers(log_decay, inputs, None)
    h = torch.addcmul(inputs.to(wide), decay, initial_state.to(wide)[:, None])
    return h if wide.is_complex else h.to(inputs.dtype), h[:, -1]


def diagonal_scan(
    log_decay: Tensor, inputs: Tensor, initial_state: Tensor | None, doc_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `zoo.kernels.diagonal_scan.diagonal_scan`."""
    if inputs.shape[1] == 1 and initial_state is not None and doc_ids is None:
        return step(log_decay, inputs, initial_state)
    return fused.diagonal_scan(log_decay, inputs, initial_state, doc_ids, "native")
