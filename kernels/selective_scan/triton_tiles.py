"""Tiles of the Triton kernels of the selective scan, and time cut into chunks that run side by side."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels import gpu

LOG2E = tl.constexpr(1.4426950408889634)
ENDS = [{"BE": 32, "num_warps": 1}, {"BE": 16, "num_warps": 1}]
FEW, MANY = 1024, 2048  # warps: with fewer than FEW time is cut, into as many chunks as make MANY
SHORTEST = 64  # tokens of a chunk


def padded(N: int) -> int:
    """States of a channel in a tile."""
    return max(triton.next_power_of_2(N), 2)


def parts(batch: int, T: int, warps: int, interval: int) -> tuple[int, int]:
    """Chunks of time and the tokens of each, a multiple of `interval`; warps: of one row without chunks."""
    warps *= batch
    chunks = 1 if warps >= FEW else min(MANY // warps, T // SHORTEST)
    span = triton.cdiv(triton.cdiv(T, max(chunks, 1)), interval) * interval
    return triton.cdiv(T, span), span


@triton.jit
def tile(E, N, BE: tl.constexpr, NP: tl.constexpr):
    """Channels and states of this program, which of them exist, and where they lie in [E, N]."""
    e, n = tl.program_id(0) * BE + tl.arange(0, BE), tl.arange(0, NP)
    channel, slot = e < E, n < N
    return e, n, channel, slot, channel[:, None] & slot[None, :], e[:, None] * N + n[None, :]


@triton.jit
def step_decay(A, here, inside):
    """A as an exponent of two."""
    return tl.load(A + here, mask=inside, other=0.0).to(tl.float32) * LOG2E


@triton.jit
def begins(docs, row, t, T):
    """Is token t the first of its document (never the first of a row, nor one after the last)?"""
    there = (t > 0) & (t < T)
    at = docs + row * T + t
    return tl.load(at, mask=there, other=0) != tl.load(at - 1, mask=there, other=0)


@triton.jit
def channels(x, row, t, e, channel, T, E):
    """x[row, t] of the tile's channels in float32, zero after the last token."""
    return tl.load(x + (row * T + t) * E + e, mask=channel & (t < T), other=0.0).to(tl.float32)


@triton.jit
def slots(x, row, t, n, slot, T, N):
    """B or C of a token in float32."""
    return tl.load(x + (row * T + t) * N + n, mask=slot & (t < T), other=0.0).to(tl.float32)


@triton.jit
def token(u, delta, Bt, Ct, row, t, e, n, channel, slot, T, E, N):
    """delta, u, B, C of a token."""
    d, value = channels(delta, row, t, e, channel, T, E), channels(u, row, t, e, channel, T, E)
    return d, value, slots(Bt, row, t, n, slot, T, N), slots(Ct, row, t, n, slot, T, N)


@triton.jit
def selective_scan_ends(
    x, delta, A, M, docs, ends, totals, T, span, E, N,
    NP: tl.constexpr, BE: tl.constexpr, GROUP: tl.constexpr, DOCS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Of a chunk alone: the state after it, h <- a h + delta x M (x = u, M = B), or in reverse the gradient of the
    state before it, G <- a (G + x M) (x = dy, M = C), and the sum of delta, -1 where a document begins."""
    chunk, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    e, n, channel, slot, inside, here = tile(E, N, BE, NP)
    decay = step_decay(A, here, inside)
    h = tl.zeros((BE, NP), tl.float32)
    total = tl.zeros((BE,), tl.float32)
    for offset in range(0, span, GROUP):
        for i in tl.static_range(GROUP):
            t = chunk * span + offset + i
            if REVERSE:
                t = chunk * span + span - 1 - offset - i
            d, value = channels(delta, row, t, e, channel, T, E), channels(x, row, t, e, channel, T, E)
            m = slots(M, row, t, n, slot, T, N)
            a = tl.exp2(d[:, None] * decay)
            total = tl.where(total < 0, total, total + d)
            if REVERSE:
                h = a * (h + value[:, None] * m[None, :])
            if DOCS:
                new = begins(docs, row, t, T)
                h = tl.where(new, 0.0, h)
                total = tl.where(new, -1.0, total)
            if not REVERSE:
                h = a * h + (d * value)[:, None] * m[None, :]
    at = row * tl.num_programs(1) + chunk
    tl.store(ends + at * E * N + here, h, mask=inside)
    tl.store(totals + at * E + e, total, mask=channel)


@triton.jit
def selective_scan_pass(
    ends, totals, A, start, starts, chunks, E, N,
    NP: tl.constexpr, BE: tl.constexpr, START: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """The state that enters each chunk, or the gradient of the one that leaves it."""
    row = tl.program_id(1).to(tl.int64)
    e, _, channel, _, inside, here = tile(E, N, BE, NP)
    decay = step_decay(A, here, inside)
    h = tl.zeros((BE, NP), tl.float32)
    if START:
        h = tl.load(start + row * E * N + here, mask=inside, other=0.0)
    for i in range(0, chunks):
        at = row * chunks + i
        if REVERSE:
            at = row * chunks + chunks - 1 - i
        tl.store(starts + at * E * N + here, h, mask=inside)
        total = tl.load(totals + at * E + e, mask=channel, other=0.0)[:, None]
        add = tl.load(ends + at * E * N + here, mask=inside, other=0.0)
        h = tl.where(total < 0, 0.0, tl.exp2(total * decay)) * h + add


def chunk_starts(
    x: Tensor, delta: Tensor, A: Tensor, M: Tensor, doc_ids: Tensor | None, start: Tensor | None, chunks: int,
    span: int, *, reverse: bool,
) -> Tensor:  # fmt: skip
    """[B, chunks, E, N]: the state that enters each chunk, or in reverse the gradient of the one that leaves it."""
    (batch, T, E), N = x.shape, A.shape[1]
    config = gpu.options("selective_scan_ends", x, ENDS, N=N)
    ends, starts = A.new_empty(batch, chunks, E, N), A.new_empty(batch, chunks, E, N)
    totals = A.new_empty(batch, chunks, E)
    tiles, none = triton.cdiv(E, config["BE"]), totals  # a pointer that is not read
    with gpu.launching(x):
        selective_scan_ends[(tiles, chunks, batch)](
            x, delta, A, M, none if doc_ids is None else doc_ids, ends, totals, T, span, E, N, NP=padded(N), GROUP=4,
            DOCS=doc_ids is not None, REVERSE=reverse, **config,
        )  # fmt: skip
        selective_scan_pass[(tiles, batch)](
            ends, totals, A, none if start is None else start, starts, chunks, E, N, NP=padded(N),
            START=start is not None, REVERSE=reverse, **config,
        )  # fmt: skip
    return starts
