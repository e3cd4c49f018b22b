"""The diagonal scan in Triton: a program owns a tile of channels of one row and walks over time with h in registers;
the multipliers come in as they are read, each element is touched once. Backward is the same walk from the end. Complex
numbers are (re, im) pairs in memory and two tiles in registers. The equations are in native.c.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels import gpu
from zoo.kernels.diagonal_scan import fused

TILES = [{"BD": 64, "num_warps": 2}, {"BD": 128, "num_warps": 4}, {"BD": 32, "num_warps": 1}]


@triton.jit
def diagonal_scan_forward(a, x, start, h, T, D, COMPLEX: tl.constexpr, START: tl.constexpr, BD: tl.constexpr):
    """A tile of channels, token by token."""
    row, d = tl.program_id(1).to(tl.int64), tl.program_id(0) * BD + tl.arange(0, BD)
    inside = d < D
    P: tl.constexpr = 2 if COMPLEX else 1
    re = tl.zeros((BD,), tl.float32)
    im = tl.zeros((BD,), tl.float32)
    if START:
        re = tl.load(start + (row * D + d) * P, mask=inside, other=0.0)
        if COMPLEX:
            im = tl.load(start + (row * D + d) * P + 1, mask=inside, other=0.0)
    for t in range(0, T):
        at = ((row * T + t) * D + d) * P
        ar = tl.load(a + at, mask=inside, other=0.0)
        xr = tl.load(x + at, mask=inside, other=0.0)
        if COMPLEX:
            ai = tl.load(a + at + 1, mask=inside, other=0.0)
            xi = tl.load(x + at + 1, mask=inside, other=0.0)
            new = ar * re - ai * im + xr
            im = ar * im + ai * re + xi
            re = new
            tl.store(h + at + 1, im, mask=inside)
        else:
            re = ar * re + xr
        tl.store(h + at, re, mask=inside)


@triton.jit
def diagonal_scan_backward(
    dh, a, h, start, dx, da, dstart, T, D, COMPLEX: tl.constexpr, START: tl.constexpr, BD: tl.constexpr
):
    """G = dh + conj(a_{t+1}) G from the last token on."""
    row, d = tl.program_id(1).to(tl.int64), tl.program_id(0) * BD + tl.arange(0, BD)
    inside = d < D
    P: tl.constexpr = 2 if COMPLEX else 1
    re = tl.zeros((BD,), tl.float32)
    im = tl.zeros((BD,), tl.float32)
    for back in range(0, T):
        t = T - 1 - back
        at = ((row * T + t) * D + d) * P
        re += tl.load(dh + at, mask=inside, other=0.0)
        if COMPLEX:
            im += tl.load(dh + at + 1, mask=inside, other=0.0)
            tl.store(dx + at + 1, im, mask=inside)
        tl.store(dx + at, re, mask=inside)
        there = inside & (t > 0)
        hr = tl.load(h + at - D * P, mask=there, other=0.0)
        if START:
            hr += tl.load(start + (row * D + d) * P, mask=inside & (t == 0), other=0.0)
        ar = tl.load(a + at, mask=inside, other=0.0)
        if COMPLEX:
            hi = tl.load(h + at - D * P + 1, mask=there, other=0.0)
            if START:
                hi += tl.load(start + (row * D + d) * P + 1, mask=inside & (t == 0), other=0.0)
            ai = tl.load(a + at + 1, mask=inside, other=0.0)
            tl.store(da + at, re * hr + im * hi, mask=inside)
            tl.store(da + at + 1, im * hr - re * hi, mask=inside)
            new = ar * re + ai * im
            im = ar * im - ai * re
            re = new
        else:
            tl.store(da + at, re * hr, mask=inside)
            re = ar * re
    tl.store(dstart + (row * D + d) * P, re, mask=inside)
    if COMPLEX:
        tl.store(dstart + (row * D + d) * P + 1, im, mask=inside)


def _real(x: Tensor) -> Tensor:
    return torch.view_as_real(x) if x.is_complex() else x


def forward(a: Tensor, x: Tensor, initial_state: Tensor | None) -> Tensor:
    """h [B, T, D]; everything contiguous, float32 or complex64."""
    (B, T, D), h = x.shape, torch.empty_like(x)
    config = gpu.options("diagonal_scan_forward", x, TILES)
    start = _real(x if initial_state is None else initial_state)
    with gpu.launching(x):
        diagonal_scan_forward[(triton.cdiv(D, config["BD"]), B)](
            _real(a), _real(x), start, _real(h), T, D, COMPLEX=x.is_complex(), START=initial_state is not None, **config
        )
    return h


def backward(dh: Tensor, a: Tensor, h: Tensor, initial_state: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a, x and the initial state."""
    (B, T, D), dh = h.shape, dh.resolve_conj()
    da, dx, dstart = torch.empty_like(a), torch.empty_like(h), h.new_empty(B, D)
    config = gpu.options("diagonal_scan_backward", h, TILES)
    start = _real(h if initial_state is None else initial_state)
    with gpu.launching(h):
        diagonal_scan_backward[(triton.cdiv(D, config["BD"]), B)](
            _real(dh), _real(a), _real(h), start, _real(dx), _real(da), _real(dstart), T, D, COMPLEX=h.is_complex(),
            START=initial_state is not None, **config,
        )  # fmt: skip
    return da, dx, dstart


def diagonal_scan(
    log_decay: Tensor, inputs: Tensor, initial_state: Tensor | None, doc_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `zoo.kernels.diagonal_scan.diagonal_scan`. One token is the same kernel."""
    return fused.diagonal_scan(log_decay, inputs, initial_state, doc_ids, "triton")


def launches() -> Iterator[tuple[str, callable]]:
    """What tools/aot.py compiles: realistic calls on meta tensors, forward and backward."""

    def call(dtype):
        x = torch.empty(2, 4096, 2048, dtype=dtype, device="meta")
        state = x.new_empty(2, 2048)

        def both():
            forward(x, x, state)
            backward(x, x, x, state)

        yield str(dtype).removeprefix("torch."), both

    yield from call(torch.float32)
    yield from call(torch.complex64)
