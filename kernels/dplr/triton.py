"""Diagonal plus low-rank recurrence in Triton, token by token: a program owns a tile of value channels of one head and
walks over time with its state S [KP, BV] in registers. Backward walks over intervals of 16 tokens from the last to the
first: it rebuilds every S before a token and h = S^T a of an interval into a scratch that stays in the second-level
cache, then goes back through them (the equations are in native.c). Sums over value channels (all gradients but v's) are
partial sums of a tile, added up afterwards in one order. No products of matrices: right for short heads and decoding,
slower than a chunked form on long sequences.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels import gpu
from zoo.kernels.dplr import fused

INTERVAL = 16
FORWARD = [{"BV": 32, "num_warps": 4}, {"BV": 16, "num_warps": 4}]
BACKWARD = [{"BV": 32, "num_warps": 4}, {"BV": 16, "num_warps": 4}]


@triton.jit
def continues(docs, row, t, T, DOCS: tl.constexpr):
    """1 where a token belongs to the document of the one before it, else 0."""
    same = 1.0
    if DOCS:
        new = tl.load(docs + row * T + t) != tl.load(docs + row * T + tl.maximum(t - 1, 0))
        same = tl.where(new, 0.0, 1.0)
    return same


@triton.jit(do_not_specialize=["scale"])
def dplr_forward(
    q, k, v, a, b, g, start, docs, o, final, states, scale, T, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    KP: tl.constexpr, BV: tl.constexpr, INTERVAL: tl.constexpr, DOCS: tl.constexpr, START: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    """A tile of value channels, token by token."""
    row, h = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    d, e = tl.arange(0, KP), tl.program_id(0) * BV + tl.arange(0, BV)
    inside = (d < K)[:, None] & (e < V)[None, :]
    here = d[:, None] * V + e[None, :]
    S = tl.zeros((KP, BV), tl.float32)
    if START:
        S = tl.load(start + (row * H + h) * (K * V) + here, mask=inside, other=0.0)
    count = tl.cdiv(T, INTERVAL)
    for m in range(0, count):
        if KEEP:
            tl.store(states + ((row * count + m) * H + h) * (K * V) + here, S, mask=inside)
        for t in range(m * INTERVAL, tl.minimum(m * INTERVAL + INTERVAL, T)):
            token = (row * T + t) * H + h
            same = continues(docs, row, t, T, DOCS)
            reads = tl.load(a + token * K + d, mask=d < K, other=0.0).to(tl.float32) * same
            decay = tl.exp(tl.load(g + token * K + d, mask=d < K, other=0.0)) * same
            writes = tl.load(b + token * K + d, mask=d < K, other=0.0).to(tl.float32)
            key = tl.load(k + token * K + d, mask=d < K, other=0.0).to(tl.float32)
            query = tl.load(q + token * K + d, mask=d < K, other=0.0).to(tl.float32) * scale
            value = tl.load(v + token * V + e, mask=e < V, other=0.0).to(tl.float32)
            held = tl.sum(S * reads[:, None], 0)
            S = S * decay[:, None] + writes[:, None] * held[None, :] + key[:, None] * value[None, :]
            out = tl.sum(S * query[:, None], 0)
            tl.store(o + token * V + e, out.to(o.dtype.element_ty), mask=e < V)
    tl.store(final + (row * H + h) * (K * V) + here, S, mask=inside)


@triton.jit(do_not_specialize=["scale"])
def dplr_backward(
    grad_o, grad_final, q, k, v, a, b, g, docs, states, scratch, reading, dq, dk, dv, da, db, dg, dstart, scale, batch,
    T, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, BV: tl.constexpr, INTERVAL: tl.constexpr,
    DOCS: tl.constexpr, END: tl.constexpr,
):  # fmt: skip
    """A tile of value channels, interval by interval from the end. scratch [B, H, INTERVAL, K, V], reading
    [B, H, INTERVAL, V]; dq, dk, da, db, dg [tiles, B, T, H, K]."""
    tile = tl.program_id(0)
    row, h = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    d, e = tl.arange(0, KP), tile * BV + tl.arange(0, BV)
    inside = (d < K)[:, None] & (e < V)[None, :]
    here = d[:, None] * V + e[None, :]
    G = tl.zeros((KP, BV), tl.float32)
    if END:
        G = tl.load(grad_final + (row * H + h) * (K * V) + here, mask=inside, other=0.0)
    count = tl.cdiv(T, INTERVAL)
    mine, own = scratch + (row * H + h) * INTERVAL * (K * V), reading + (row * H + h) * INTERVAL * V
    for back in range(0, count):
        m = count - 1 - back
        first, end = m * INTERVAL, tl.minimum(m * INTERVAL + INTERVAL, T)
        S = tl.load(states + ((row * count + m) * H + h) * (K * V) + here, mask=inside, other=0.0)
        for t in range(first, end):
            token = (row * T + t) * H + h
            same = continues(docs, row, t, T, DOCS)
            reads = tl.load(a + token * K + d, mask=d < K, other=0.0).to(tl.float32) * same
            decay = tl.exp(tl.load(g + token * K + d, mask=d < K, other=0.0)) * same
            writes = tl.load(b + token * K + d, mask=d < K, other=0.0).to(tl.float32)
            key = tl.load(k + token * K + d, mask=d < K, other=0.0).to(tl.float32)
            value = tl.load(v + token * V + e, mask=e < V, other=0.0).to(tl.float32)
            tl.store(mine + (t - first) * (K * V) + here, S, mask=inside)
            held = tl.sum(S * reads[:, None], 0)
            tl.store(own + (t - first) * V + e, held, mask=e < V)
            S = S * decay[:, None] + writes[:, None] * held[None, :] + key[:, None] * value[None, :]
        tl.debug_barrier()  # what is read back may have been written by another thread
        for i in range(0, end - first):
            t = end - 1 - i
            token = (row * T + t) * H + h
            part = (((tile * batch + row) * T + t) * H + h) * K
            # S after the token, and what its output asks of it
            same = continues(docs, row, t, T, DOCS)
            decay = tl.exp(tl.load(g + token * K + d, mask=d < K, other=0.0)) * same
            writes = tl.load(b + token * K + d, mask=d < K, other=0.0).to(tl.float32)
            key = tl.load(k + token * K + d, mask=d < K, other=0.0).to(tl.float32)
            query = tl.load(q + token * K + d, mask=d < K, other=0.0).to(tl.float32) * scale
            value = tl.load(v + token * V + e, mask=e < V, other=0.0).to(tl.float32)
            grad = tl.load(grad_o + token * V + e, mask=e < V, other=0.0).to(tl.float32)
            S = tl.load(mine + (t - first) * (K * V) + here, mask=inside, other=0.0)
            held = tl.load(own + (t - first) * V + e, mask=e < V, other=0.0)
            after = S * decay[:, None] + writes[:, None] * held[None, :] + key[:, None] * value[None, :]
            tl.store(dq + part + d, tl.sum(after * grad[None, :], 1) * scale, mask=d < K)
            G += query[:, None] * grad[None, :]
            # what was added to the state
            tl.store(dk + part + d, tl.sum(G * value[None, :], 1), mask=d < K)
            tl.store(db + part + d, tl.sum(G * held[None, :], 1), mask=d < K)
            dvalue, dheld = tl.sum(G * key[:, None], 0), tl.sum(G * writes[:, None], 0)
            tl.store(dv + token * V + e, dvalue.to(dv.dtype.element_ty), mask=e < V)
            # the state before the token
            reads = tl.load(a + token * K + d, mask=d < K, other=0.0).to(tl.float32) * same
            tl.store(da + part + d, tl.sum(S * dheld[None, :], 1) * same, mask=d < K)
            tl.store(dg + part + d, tl.sum(G * S, 1) * decay, mask=d < K)
            G = G * decay[:, None] + reads[:, None] * dheld[None, :]
        tl.debug_barrier()
    tl.store(dstart + (row * H + h) * (K * V) + here, G, mask=inside)


def _constants(q: Tensor, v: Tensor, doc_ids: Tensor | None) -> dict[str, int | bool]:
    H, K = q.shape[2:]
    return {"H": H, "K": K, "V": v.shape[3], "KP": max(16, triton.next_power_of_2(K)), "DOCS": doc_ids is not None}


def forward(q, k, v, a, b, log_decay, initial_state, doc_ids, scale, interval, o, final, states) -> None:
    """Fill o, final and (unless None) states. log_decay and states: float32; all contiguous."""
    B, T, H, V = v.shape
    config = gpu.options("dplr_forward", v, FORWARD, K=q.shape[3], V=V)
    none = final  # a pointer that is not read
    with gpu.launching(v):
        dplr_forward[(triton.cdiv(V, config["BV"]), B * H)](
            q, k, v, a, b, log_decay, none if initial_state is None else initial_state,
            none if doc_ids is None else doc_ids, o, final, none if states is None else states, scale, T,
            INTERVAL=interval, START=initial_state is not None, KEEP=states is not None,
            **_constants(q, v, doc_ids), **config,
        )  # fmt: skip


def backward(grad_o, grad_final, q, k, v, a, b, log_decay, doc_ids, states, scale, interval) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, a, b, log_decay and the initial state."""
    (B, T, H, V), K = v.shape, q.shape[3]
    config = gpu.options("dplr_backward", v, BACKWARD, K=K, V=V)
    tiles = triton.cdiv(V, config["BV"])
    dq, dk, da, db, dg = (states.new_empty(tiles, B, T, H, K) for _ in range(5))
    dv, dstart = torch.empty_like(v), states.new_empty(B, H, K, V)
    scratch, reading = states.new_empty(B, H, interval, K, V), states.new_empty(B, H, interval, V)
    none = dstart
    with gpu.launching(v):
        dplr_backward[(tiles, B * H)](
            grad_o, none if grad_final is None else grad_final, q, k, v, a, b, log_decay,
            none if doc_ids is None else doc_ids, states, scratch, reading, dq, dk, dv, da, db, dg, dstart, scale, B, T,
            INTERVAL=interval, END=grad_final is not None, **_constants(q, v, doc_ids), **config,
        )  # fmt: skip
    parts = zip((dq, dk, da, db, dg), (q, k, a, b, log_decay))
    dq, dk, da, db, dg = (x.sum(0).to(like.dtype) for x, like in parts)
    return dq, dk, dv, da, db, dg, dstart


def step(q, k, v, a, b, log_decay, initial_state, scale) -> tuple[Tensor, Tensor]:
    """Output and state after one token: the state is read and written once."""
    B, _, H, V = v.shape
    o, final = torch.empty_like(v), v.new_empty(B, H, q.shape[3], V, dtype=torch.float32)
    forward(q, k, v, a, b, log_decay, initial_state, None, scale, INTERVAL, o, final, None)
    return o, final


def dplr(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, log_decay: Tensor, scale: float,
    initial_state: Tensor | None, doc_ids: Tensor | None, chunk_size: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `zoo.kernels.dplr.dplr`."""
    engine = sys.modules[__name__]
    return fused.dplr(q, k, v, a, b, log_decay, float(scale), initial_state, doc_ids, chunk_size, INTERVAL, engine)


def launches() -> Iterator[tuple[str, Callable[[], None]]]:
    """What tools/aot.py compiles: realistic calls on meta tensors, forward, backward and one token."""

    def call(name, H, K, V, docs=False):
        B, T = 2, 4096
        q = torch.empty(B, T, H, K, dtype=torch.bfloat16, device="meta")
        v, state = q.new_empty(B, T, H, V), q.new_empty(B, H, K, V, dtype=torch.float32)
        a = state.new_empty(B, T, H, K)  # a, b and the decay come in float32 from the layer
        ids = q.new_empty(B, T, dtype=torch.int64) if docs else None
        states = state.new_empty(B, T // INTERVAL, H, K, V)

        def both():
            forward(q, a, v, a, a, a, state, ids, 0.5, INTERVAL, torch.empty_like(v), state, states)
            backward(v, state, q, a, v, a, a, a, ids, states, 0.5, INTERVAL)

        yield f"{name} {K}x{V}", both

    yield from call("dplr", 8, 128, 128)
    yield from call("dplr, documents", 16, 64, 64, docs=True)
