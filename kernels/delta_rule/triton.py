"""The gated delta rule in Triton, token by token: a program owns a tile of value channels of one head and walks over
time with its state S [KP, BV] in registers. Backward walks over intervals of 16 tokens from the last to the first: it
rebuilds every S' and error of an interval into a scratch that stays in the second-level cache, then goes back through
them (the equations are in native.c). Sums over value channels (dq, dk, dbeta, dg) are partial sums of a tile, added up
afterwards in one order. No products of matrices: right for short heads and decoding, slower than a chunked form on long
sequences.

DECAY is 0 for none, 1 per head [B, T, H], 2 per channel [B, T, H, K]; R heads share q and k.
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
from zoo.kernels.delta_rule import fused

INTERVAL = 16
FORWARD = [{"BV": 32, "num_warps": 4}, {"BV": 16, "num_warps": 4}]
BACKWARD = [{"BV": 32, "num_warps": 4}, {"BV": 16, "num_warps": 4}]


@triton.jit
def multiplier(
    g, docs, row, t, h, d, T, H: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, DECAY: tl.constexpr,
    DOCS: tl.constexpr,
):  # fmt: skip
    """exp(g_t) [KP], 0 where a document begins."""
    a = tl.full((KP,), 1.0, tl.float32)
    if DECAY == 1:
        a = a * tl.exp(tl.load(g + (row * T + t) * H + h))
    if DECAY == 2:
        a = tl.exp(tl.load(g + ((row * T + t) * H + h) * K + d, mask=d < K, other=0.0))
    if DOCS:
        new = tl.load(docs + row * T + t) != tl.load(docs + row * T + tl.maximum(t - 1, 0))
        a = tl.where(new, 0.0, a)
    return a


@triton.jit(do_not_specialize=["scale"])
def delta_rule_forward(
    q, k, v, beta, g, start, docs, o, final, states, scale, T, H: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, KP: tl.constexpr, BV: tl.constexpr, INTERVAL: tl.constexpr, DECAY: tl.constexpr,
    DOCS: tl.constexpr, START: tl.constexpr, KEEP: tl.constexpr,
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
            token = row * T + t
            key = tl.load(k + (token * (H // R) + h // R) * K + d, mask=d < K, other=0.0).to(tl.float32)
            query = tl.load(q + (token * (H // R) + h // R) * K + d, mask=d < K, other=0.0).to(tl.float32) * scale
            value = tl.load(v + (token * H + h) * V + e, mask=e < V, other=0.0).to(tl.float32)
            S *= multiplier(g, docs, row, t, h, d, T, H, K, KP, DECAY, DOCS)[:, None]
            write = tl.load(beta + token * H + h) * (value - tl.sum(S * key[:, None], 0))
            S += key[:, None] * write[None, :]
            out = tl.sum(S * query[:, None], 0)
            tl.store(o + (token * H + h) * V + e, out.to(o.dtype.element_ty), mask=e < V)
    tl.store(final + (row * H + h) * (K * V) + here, S, mask=inside)


@triton.jit(do_not_specialize=["scale"])
def delta_rule_backward(
    grad_o, grad_final, q, k, v, beta, g, docs, states, scratch, errors, dq, dk, dv, dbeta, dg, dstart, scale, batch, T,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, BV: tl.constexpr,
    INTERVAL: tl.constexpr, DECAY: tl.constexpr, DOCS: tl.constexpr, END: tl.constexpr,
):  # fmt: skip
    """A tile of value channels, interval by interval from the end. scratch [B, H, INTERVAL, K, V], errors
    [B, H, INTERVAL, V]; dq, dk, dg [tiles, B, T, H, K], dbeta [tiles, B, T, H]."""
    tile = tl.program_id(0)
    row, h = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    d, e = tl.arange(0, KP), tile * BV + tl.arange(0, BV)
    inside = (d < K)[:, None] & (e < V)[None, :]
    here = d[:, None] * V + e[None, :]
    G = tl.zeros((KP, BV), tl.float32)
    if END:
        G = tl.load(grad_final + (row * H + h) * (K * V) + here, mask=inside, other=0.0)
    count = tl.cdiv(T, INTERVAL)
    mine, own = scratch + (row * H + h) * INTERVAL * (K * V), errors + (row * H + h) * INTERVAL * V
    for back in range(0, count):
        m = count - 1 - back
        first, end = m * INTERVAL, tl.minimum(m * INTERVAL + INTERVAL, T)
        S = tl.load(states + ((row * count + m) * H + h) * (K * V) + here, mask=inside, other=0.0)
        for t in range(first, end):
            token = row * T + t
            key = tl.load(k + (token * (H // R) + h // R) * K + d, mask=d < K, other=0.0).to(tl.float32)
            value = tl.load(v + (token * H + h) * V + e, mask=e < V, other=0.0).to(tl.float32)
            S *= multiplier(g, docs, row, t, h, d, T, H, K, KP, DECAY, DOCS)[:, None]
            tl.store(mine + (t - first) * (K * V) + here, S, mask=inside)
            error = value - tl.sum(S * key[:, None], 0)
            tl.store(own + (t - first) * V + e, error, mask=e < V)
            S += key[:, None] * (tl.load(beta + token * H + h) * error)[None, :]
        tl.debug_barrier()  # what is read back may have been written by another thread
        for i in range(0, end - first):
            t = end - 1 - i
            token = row * T + t
            key = tl.load(k + (token * (H // R) + h // R) * K + d, mask=d < K, other=0.0).to(tl.float32)
            query = tl.load(q + (token * (H // R) + h // R) * K + d, mask=d < K, other=0.0).to(tl.float32) * scale
            grad = tl.load(grad_o + (token * H + h) * V + e, mask=e < V, other=0.0).to(tl.float32)
            rate = tl.load(beta + token * H + h)
            S = tl.load(mine + (t - first) * (K * V) + here, mask=inside, other=0.0)
            error = tl.load(own + (t - first) * V + e, mask=e < V, other=0.0)
            write = rate * error
            part = ((tile * batch + row) * T + t) * H + h
            G += query[:, None] * grad[None, :]
            grad_q = tl.sum((S + key[:, None] * write[None, :]) * grad[None, :], 1) * scale
            tl.store(dq + part * K + d, grad_q, mask=d < K)
            dw = tl.sum(G * key[:, None], 0)
            grad_k = tl.sum(G * write[None, :], 1)
            tl.store(dbeta + part, tl.sum(dw * error, 0))
            de = rate * dw
            tl.store(dv + (token * H + h) * V + e, de.to(dv.dtype.element_ty), mask=e < V)
            G -= key[:, None] * de[None, :]
            tl.store(dk + part * K + d, grad_k - tl.sum(S * de[None, :], 1), mask=d < K)
            if DECAY > 0:
                tl.store(dg + part * K + d, tl.sum(G * S, 1), mask=d < K)
            G *= multiplier(g, docs, row, t, h, d, T, H, K, KP, DECAY, DOCS)[:, None]
        tl.debug_barrier()
    tl.store(dstart + (row * H + h) * (K * V) + here, G, mask=inside)


def _constants(q: Tensor, v: Tensor, log_decay: Tensor | None, doc_ids: Tensor | None) -> dict[str, int | bool]:
    (H, V), (G, K) = v.shape[2:], q.shape[2:]
    return {
        "H": H, "R": H // G, "K": K, "V": V, "KP": max(16, triton.next_power_of_2(K)),
        "DECAY": 0 if log_decay is None else log_decay.ndim - 2, "DOCS": doc_ids is not None,
    }  # fmt: skip


def forward(q, k, v, beta, log_decay, initial_state, doc_ids, scale, interval, o, final, states) -> None:
    """Fill o, final and (unless None) states. Gates and states: float32; q, k, v, o of one dtype; all contiguous."""
    B, T, H, V = v.shape
    config = gpu.options("delta_rule_forward", v, FORWARD, K=q.shape[3], V=V)
    none = final  # a pointer that is not read
    with gpu.launching(v):
        delta_rule_forward[(triton.cdiv(V, config["BV"]), B * H)](
            q, k, v, beta, none if log_decay is None else log_decay, none if initial_state is None else initial_state,
            none if doc_ids is None else doc_ids, o, final, none if states is None else states, scale, T,
            INTERVAL=interval, START=initial_state is not None, KEEP=states is not None,
            **_constants(q, v, log_decay, doc_ids), **config,
        )  # fmt: skip


def backward(grad_o, grad_final, q, k, v, beta, log_decay, doc_ids, states, scale, interval) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, beta, log_decay and the initial state."""
    (B, T, H, V), (G, K) = v.shape, q.shape[2:]
    config = gpu.options("delta_rule_backward", v, BACKWARD, K=K, V=V)
    tiles = triton.cdiv(V, config["BV"])
    dq, dk = states.new_empty(tiles, B, T, H, K), states.new_empty(tiles, B, T, H, K)
    dg = dq if log_decay is None else states.new_empty(tiles, B, T, H, K)
    dv, dbeta, dstart = torch.empty_like(v), states.new_empty(tiles, B, T, H), states.new_empty(B, H, K, V)
    scratch, errors = states.new_empty(B, H, interval, K, V), states.new_empty(B, H, interval, V)
    none = dstart
    with gpu.launching(v):
        delta_rule_backward[(tiles, B * H)](
            grad_o, none if grad_final is None else grad_final, q, k, v, beta, none if log_decay is None else log_decay,
            none if doc_ids is None else doc_ids, states, scratch, errors, dq, dk, dv, dbeta, dg, dstart, scale, B, T,
            INTERVAL=interval, END=grad_final is not None, **_constants(q, v, log_decay, doc_ids), **config,
        )  # fmt: skip
    dq, dk = (x.sum(0).unflatten(2, (G, H // G)).sum(3).to(q.dtype) for x in (dq, dk))
    if log_decay is None:
        dg = states.new_empty(0)
    else:
        dg = dg.sum(0) if log_decay.ndim == 4 else dg.sum((0, 4))
    return dq, dk, dv, dbeta.sum(0), dg, dstart


def step(q, k, v, beta, log_decay, initial_state, scale) -> tuple[Tensor, Tensor]:
    """Output and state after one token: the state is read and written once."""
    B, _, H, V = v.shape
    o, final = torch.empty_like(v), v.new_empty(B, H, q.shape[3], V, dtype=torch.float32)
    forward(q, k, v, beta, log_decay, initial_state, None, scale, INTERVAL, o, final, None)
    return o, final


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, scale: float,
    initial_state: Tensor | None, doc_ids: Tensor | None, chunk_size: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `zoo.kernels.delta_rule.delta_rule`."""
    q, k, beta = q.to(v.dtype), k.to(v.dtype), beta.to(wide(v.dtype))
    return fused.delta_rule(
        q, k, v, beta, log_decay, float(scale), initial_state, doc_ids, chunk_size, INTERVAL, sys.modules[__name__]
    )


def launches() -> Iterator[tuple[str, callable]]:
    """What tools/aot.py compiles: realistic calls on meta tensors, forward, backward and one token."""

    def call(name, G, H, K, V, decay, docs=False):
        B, T = 2, 4096
        q = torch.empty(B, T, G, K, dtype=torch.bfloat16, device="meta")
        v, state = q.new_empty(B, T, H, V), q.new_empty(B, H, K, V, dtype=torch.float32)
        beta = state.new_empty(B, T, H)
        g = None if decay is None else state.new_empty((B, T, H, K)[: 3 if decay == "head" else 4])
        ids = q.new_empty(B, T, dtype=torch.int64) if docs else None
        states = state.new_empty(B, T // INTERVAL, H, K, V)

        def both():
            forward(q, q, v, beta, g, state, ids, 0.5, INTERVAL, torch.empty_like(v), state, states)
            backward(v, state, q, q, v, beta, g, ids, states, 0.5, INTERVAL)

        yield f"{name} {K}x{V}", both

    yield from call("head", 4, 8, 128, 128, "head")
    yield from call("channel, documents", 4, 4, 64, 64, "channel", docs=True)
