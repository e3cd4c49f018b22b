"""Backward of the selective scan in Triton. A program walks over groups of tokens from the last to the first: from the
state saved before the group's 16 tokens it rebuilds p_t = exp(delta_t A) h_{t-1} of the group, in registers, then goes
back through the group (the equations are in native.c). Sums over channels (dB, dC) and over chunks and rows (dA) are
partial sums of a program, added up afterwards in one order."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels import gpu
from zoo.kernels.selective_scan.triton_tiles import (
    LOG2E,
    begins,
    channels,
    chunk_starts,
    padded,
    parts,
    slots,
    step_decay,
    tile,
    token,
)

BACKWARD = [{"BE": 16, "GROUP": 8, "num_warps": 1}, {"BE": 16, "GROUP": 4, "num_warps": 1}]


@triton.jit
def selective_scan_backward(
    dy, dlast, u, delta, A, Bt, Ct, docs, states, du, ddelta, dA, dB, dC, dstart, T, span, E, N, EP,
    NP: tl.constexpr, BE: tl.constexpr, INTERVAL: tl.constexpr, GROUP: tl.constexpr, END: tl.constexpr,
    DOCS: tl.constexpr,
):  # fmt: skip
    """A tile of channels, `span` tokens of a row. dlast [B, chunks, E, N]; dA [B, chunks, E, N]; dB, dC
    [tiles, B, T, N]."""
    chunk, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    own = row * tl.num_programs(1) + chunk
    partial = tl.program_id(0).to(tl.int64) * tl.num_programs(2) + row
    e, n, channel, slot, inside, here = tile(E, N, BE, NP)
    decay = step_decay(A, here, inside)
    grad_A = tl.zeros((BE, NP), tl.float32)
    G = tl.zeros((BE, NP), tl.float32)
    if END:
        G = tl.load(dlast + own * E * N + here, mask=inside, other=0.0)
    count = tl.cdiv(T, INTERVAL)
    groups = tl.cdiv(tl.minimum(span, T - chunk * span), GROUP)
    for back in range(0, groups):
        first = chunk * span + (groups - 1 - back) * GROUP
        m = first // INTERVAL
        h = tl.load(states + (row * count + m) * EP * N + here, mask=inside, other=0.0)
        for t in range(m * INTERVAL, first):
            d, x = channels(delta, row, t, e, channel, T, E), channels(u, row, t, e, channel, T, E)
            b = slots(Bt, row, t, n, slot, T, N)
            if DOCS:
                h = tl.where(begins(docs, row, t, T), 0.0, h)
            h = tl.exp2(d[:, None] * decay) * h + (d * x)[:, None] * b[None, :]
        kept = ()
        for i in tl.static_range(GROUP):
            d, x = channels(delta, row, first + i, e, channel, T, E), channels(u, row, first + i, e, channel, T, E)
            b = slots(Bt, row, first + i, n, slot, T, N)
            if DOCS:
                h = tl.where(begins(docs, row, first + i, T), 0.0, h)
            p = tl.exp2(d[:, None] * decay) * h
            kept = kept + (p,)  # noqa: RUF005 (Triton knows no stars)
            h = p + (d * x)[:, None] * b[None, :]
        for i in tl.static_range(GROUP):
            t = first + GROUP - 1 - i
            d, value, b, c = token(u, delta, Bt, Ct, row, t, e, n, channel, slot, T, E, N)
            grad = channels(dy, row, t, e, channel, T, E)
            p = kept[GROUP - 1 - i]
            x = d * value
            G += grad[:, None] * c[None, :]
            Gp = G * p
            at = (partial * T + t) * N + n
            tl.store(dC + at, tl.sum(grad[:, None] * (p + x[:, None] * b[None, :]), 0), mask=slot & (t < T))
            tl.store(dB + at, tl.sum(G * x[:, None], 0), mask=slot & (t < T))
            at = (row * T + t) * E + e
            dx = tl.sum(G * b[None, :], 1)
            tl.store(du + at, (dx * d).to(du.dtype.element_ty), mask=channel & (t < T))
            through = tl.sum(Gp * decay, 1) / LOG2E
            tl.store(ddelta + at, (dx * value + through).to(ddelta.dtype.element_ty), mask=channel & (t < T))
            grad_A += Gp * d[:, None]
            G *= tl.exp2(d[:, None] * decay)
            if DOCS:
                G = tl.where(begins(docs, row, t, T), 0.0, G)
    tl.store(dA + own * E * N + here, grad_A, mask=inside)
    if chunk == 0:
        tl.store(dstart + row * E * N + here, G, mask=inside)


def backward(dy, dlast, u, delta, A, B, C, doc_ids, states, interval) -> tuple[Tensor, ...]:
    """Gradients of u, delta, A, B, C and the initial state."""
    (batch, T, E), N = u.shape, A.shape[1]
    config = gpu.options("selective_scan_backward", u, BACKWARD, N=N)
    tiles = triton.cdiv(E, config["BE"])
    chunks, span = parts(batch, T, tiles * config["num_warps"], interval)
    if chunks > 1:
        dlast = chunk_starts(dy, delta, A, C, doc_ids, dlast, chunks, span, reverse=True)
    du, ddelta = u.new_empty(u.shape), delta.new_empty(delta.shape)
    dA, dstart = A.new_empty(batch, chunks, E, N), A.new_empty(batch, E, N)
    dB, dC = A.new_empty(tiles, batch, T, N), A.new_empty(tiles, batch, T, N)
    none = dstart  # a pointer that is not read
    with gpu.launching(u):
        selective_scan_backward[(tiles, chunks, batch)](
            dy, none if dlast is None else dlast, u, delta, A, B, C, none if doc_ids is None else doc_ids, states,
            du, ddelta, dA, dB, dC, dstart, T, span, E, N, states.shape[2], NP=padded(N), INTERVAL=interval,
            END=dlast is not None, DOCS=doc_ids is not None, **config,
        )  # fmt: skip
    return du, ddelta, dA.sum((0, 1)), dB.sum(0).to(B.dtype), dC.sum(0).to(C.dtype), dstart
