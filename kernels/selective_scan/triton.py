"""The selective scan in Triton. A program owns a tile of channels of one row and walks over time with its states
h [BE, NP] in registers; forward saves them before every 16 tokens. Backward walks over those intervals from the last
to the first: it rebuilds p_t = exp(delta_t A) h_{t-1} of 16 tokens into a scratch that stays in the second-level
cache, then goes back through them (the equations are in native.c). Nothing of size [B, T, E, N] exists, and sums over
channels (dB, dC) are partial sums of a tile, added up afterwards in one order.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels import gpu
from zoo.kernels.chunking import wide
from zoo.kernels.selective_scan import fused

INTERVAL = 16
FORWARD = [{"BE": 32, "num_warps": 1}, {"BE": 64, "num_warps": 2}, {"BE": 16, "num_warps": 1}]
BACKWARD = [{"BE": 16, "num_warps": 1}, {"BE": 32, "num_warps": 2}]


@triton.jit
def begins(docs, row, t, T):
    """Is token t the first of its document (never the first of a row)?"""
    return tl.load(docs + row * T + t) != tl.load(docs + row * T + tl.maximum(t - 1, 0))


@triton.jit
def selective_scan_forward(
    u, delta, A, Bt, Ct, start, docs, y, last, states, T, E, N, EP,
    NP: tl.constexpr, BE: tl.constexpr, INTERVAL: tl.constexpr, START: tl.constexpr, DOCS: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    """A tile of channels, token by token."""
    row = tl.program_id(1).to(tl.int64)
    e, n = tl.program_id(0) * BE + tl.arange(0, BE), tl.arange(0, NP)
    channel, slot = e < E, n < N
    inside = channel[:, None] & slot[None, :]
    here = e[:, None] * N + n[None, :]
    decay = tl.load(A + here, mask=inside, other=0.0).to(tl.float32)
    h = tl.zeros((BE, NP), tl.float32)
    if START:
        h = tl.load(start + row * E * N + here, mask=inside, other=0.0)
    count = tl.cdiv(T, INTERVAL)
    for m in range(0, count):
        if KEEP:
            tl.store(states + (row * count + m) * EP * N + here, h, mask=inside)
        for t in range(m * INTERVAL, tl.minimum(m * INTERVAL + INTERVAL, T)):
            at = (row * T + t) * E + e
            d = tl.load(delta + at, mask=channel, other=0.0).to(tl.float32)
            x = d * tl.load(u + at, mask=channel, other=0.0).to(tl.float32)
            b = tl.load(Bt + (row * T + t) * N + n, mask=slot, other=0.0).to(tl.float32)
            c = tl.load(Ct + (row * T + t) * N + n, mask=slot, other=0.0).to(tl.float32)
            if DOCS:
                h = tl.where(begins(docs, row, t, T), 0.0, h)
            h = tl.exp(d[:, None] * decay) * h + x[:, None] * b[None, :]
            tl.store(y + at, tl.sum(h * c[None, :], 1).to(y.dtype.element_ty), mask=channel)
    tl.store(last + row * E * N + here, h, mask=inside)


@triton.jit
def selective_scan_backward(
    dy, dlast, u, delta, A, Bt, Ct, docs, states, scratch, du, ddelta, dA, dB, dC, dstart, batch, T, E, N, EP,
    NP: tl.constexpr, BE: tl.constexpr, INTERVAL: tl.constexpr, END: tl.constexpr, DOCS: tl.constexpr,
):  # fmt: skip
    """A tile of channels, interval by interval from the end."""
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    e, n = tile * BE + tl.arange(0, BE), tl.arange(0, NP)
    channel, slot = e < E, n < N
    inside = channel[:, None] & slot[None, :]
    here = e[:, None] * N + n[None, :]
    decay = tl.load(A + here, mask=inside, other=0.0).to(tl.float32)
    grad_A = tl.zeros((BE, NP), tl.float32)
    G = tl.zeros((BE, NP), tl.float32)
    if END:
        G = tl.load(dlast + row * E * N + here, mask=inside, other=0.0)
    count = tl.cdiv(T, INTERVAL)
    mine = scratch + row * INTERVAL * EP * N
    for back in range(0, count):
        m = count - 1 - back
        first, end = m * INTERVAL, tl.minimum(m * INTERVAL + INTERVAL, T)
        h = tl.load(states + (row * count + m) * EP * N + here, mask=inside, other=0.0)
        for t in range(first, end):
            at = (row * T + t) * E + e
            d = tl.load(delta + at, mask=channel, other=0.0).to(tl.float32)
            x = d * tl.load(u + at, mask=channel, other=0.0).to(tl.float32)
            b = tl.load(Bt + (row * T + t) * N + n, mask=slot, other=0.0).to(tl.float32)
            if DOCS:
                h = tl.where(begins(docs, row, t, T), 0.0, h)
            p = tl.exp(d[:, None] * decay) * h
            tl.store(mine + (t - first) * EP * N + here, p, mask=inside)
            h = p + x[:, None] * b[None, :]
        tl.debug_barrier()  # what is read back may have been written by another thread
        for i in range(0, end - first):
            t = end - 1 - i
            at = (row * T + t) * E + e
            d = tl.load(delta + at, mask=channel, other=0.0).to(tl.float32)
            value = tl.load(u + at, mask=channel, other=0.0).to(tl.float32)
            grad = tl.load(dy + at, mask=channel, other=0.0).to(tl.float32)
            b = tl.load(Bt + (row * T + t) * N + n, mask=slot, other=0.0).to(tl.float32)
            c = tl.load(Ct + (row * T + t) * N + n, mask=slot, other=0.0).to(tl.float32)
            p = tl.load(mine + (t - first) * EP * N + here, mask=inside, other=0.0)
            x = d * value
            G += grad[:, None] * c[None, :]
            Gp = G * p
            part = ((tile * batch + row) * T + t) * N + n
            tl.store(dC + part, tl.sum(grad[:, None] * (p + x[:, None] * b[None, :]), 0), mask=slot)
            tl.store(dB + part, tl.sum(G * x[:, None], 0), mask=slot)
            dx = tl.sum(G * b[None, :], 1)
            tl.store(du + at, (dx * d).to(du.dtype.element_ty), mask=channel)
            through = tl.sum(Gp * decay, 1)
            tl.store(ddelta + at, (dx * value + through).to(ddelta.dtype.element_ty), mask=channel)
            grad_A += Gp * d[:, None]
            G *= tl.exp(d[:, None] * decay)
            if DOCS:
                G = tl.where(begins(docs, row, t, T), 0.0, G)
        tl.debug_barrier()
    tl.store(dA + row * E * N + here, grad_A, mask=inside)
    tl.store(dstart + row * E * N + here, G, mask=inside)


def forward(u, delta, A, B, C, initial_state, doc_ids, interval, y, last, states) -> None:
    """Fill y, last and (unless None) states. A, states: float32; the others of one dtype; everything contiguous."""
    (batch, T, E), N = u.shape, A.shape[1]
    config = gpu.options("selective_scan_forward", u, FORWARD, N=N)
    none, width = last, E if states is None else states.shape[2]  # a pointer that is not read
    with gpu.launching(u):
        selective_scan_forward[(triton.cdiv(E, config["BE"]), batch)](
            u, delta, A, B, C, none if initial_state is None else initial_state, none if doc_ids is None else doc_ids,
            y, last, none if states is None else states, T, E, N, width, NP=_padded(N), INTERVAL=interval,
            START=initial_state is not None, DOCS=doc_ids is not None, KEEP=states is not None, **config,
        )  # fmt: skip


def backward(dy, dlast, u, delta, A, B, C, doc_ids, states, interval) -> tuple[Tensor, ...]:
    """Gradients of u, delta, A, B, C and the initial state."""
    (batch, T, E), N = u.shape, A.shape[1]
    config = gpu.options("selective_scan_backward", u, BACKWARD, N=N)
    tiles = triton.cdiv(E, config["BE"])
    du, ddelta = torch.empty_like(u), torch.empty_like(delta)
    dA, dstart = A.new_empty(batch, E, N), A.new_empty(batch, E, N)
    dB, dC = A.new_empty(tiles, batch, T, N), A.new_empty(tiles, batch, T, N)
    scratch = A.new_empty(batch, interval, states.shape[2], N)
    with gpu.launching(u):
        selective_scan_backward[(tiles, batch)](
            dy, dstart if dlast is None else dlast, u, delta, A, B, C, dstart if doc_ids is None else doc_ids, states,
            scratch, du, ddelta, dA, dB, dC, dstart, batch, T, E, N, states.shape[2], NP=_padded(N), INTERVAL=interval,
            END=dlast is not None, DOCS=doc_ids is not None, **config,
        )  # fmt: skip
    return du, ddelta, dA.sum(0), dB.sum(0).to(B.dtype), dC.sum(0).to(C.dtype), dstart


def _padded(N: int) -> int:
    return max(triton.next_power_of_2(N), 2)


def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None, doc_ids: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `zoo.kernels.selective_scan.selective_scan`. One token is the same kernel: its state is read and written
    once."""
    delta, B, C = (x.to(u.dtype) for x in (delta, B, C))
    return fused.selective_scan(
        u, delta, A.to(wide(u.dtype)), B, C, initial_state, doc_ids, INTERVAL, sys.modules[__name__]
    )


def launches() -> Iterator[tuple[str, callable]]:
    """What tools/aot.py compiles: realistic calls on meta tensors, forward, backward and one token."""

    def call(name, E, N, docs=False):
        u = torch.empty(2, 4096, E, dtype=torch.bfloat16, device="meta")
        A, B = u.new_empty(E, N, dtype=torch.float32), u.new_empty(2, 4096, N)
        ids = u.new_empty(2, 4096, dtype=torch.int64) if docs else None
        h, states = A.new_empty(2, E, N), A.new_empty(2, 4096 // INTERVAL, E, N)

        def both():
            forward(u, u, A, B, B, h, ids, INTERVAL, u, h, states)
            backward(u, h, u, u, A, B, B, ids, states, INTERVAL)

        yield f"{name} {E}x{N}", both
        one = u[:, :1].contiguous(), B[:, :1].contiguous()
        yield (
            f"{name} {E}x{N} step",
            lambda: forward(one[0], one[0], A, one[1], one[1], h, None, INTERVAL, one[0], h, None),
        )

    yield from call("plain", 2048, 16)
    yield from call("documents", 2048, 16, docs=True)
