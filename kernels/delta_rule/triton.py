"""The gated delta rule in Triton, forward (backward: triton_backward.py; a few tokens: triton_step.py). Chunks of 64
tokens in the WY form of chunked.py, in this order:

    factors   b, P, w, u: see triton_factors.py, all chunks at once
    states    written = u - w S;  S <- e^{b_C} S + (k e^{b_C - b})^T written, sequential over the chunks
    output    o = scale (P written + (q e^b) S)

The state before a chunk belongs to the document of the token before it, the state after it to the document of its
last token: tokens of other documents neither read the one nor write the other.

DECAY is 0 for none, 1 per head [B, T, H], 2 per channel [B, T, H, K]; R heads share q and k.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels import gpu
from zoo.kernels.chunking import wide
from zoo.kernels.delta_rule import fused, triton_step
from zoo.kernels.delta_rule.triton_factors import constants, factors
from zoo.kernels.linear_attention.triton import CHUNK, chunk_ends, fit, kind

FEW = 16  # fewer tokens go one by one
STATES = [{"BV": 32, "num_warps": 4, "num_stages": 2}, {"BV": 64, "num_warps": 8, "num_stages": 2}]
OUTPUT = [
    {"BK": 32, "BV": 64, "num_warps": 4, "num_stages": 2},
    {"BK": 64, "BV": 64, "num_warps": 8, "num_stages": 2},
]


@triton.jit
def delta_rule_states(
    tail, w, u, b, start, docs, states, written, final, T, H: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, KP: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr, DECAY: tl.constexpr, DOCS: tl.constexpr,
    START: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Some value channels of the states of one head, chunk after chunk, and of what its tokens write. R heads share
    tail: the keys, decayed to the end of their chunk if the decay is per channel."""
    bh = tl.program_id(1)
    row, h = (bh // H).to(tl.int64), bh % H
    i, d, e = tl.arange(0, BT), tl.arange(0, KP), tl.program_id(0) * BV + tl.arange(0, BV)
    here = d[:, None] * V + e[None, :]
    inside = (d < K)[:, None] & (e < V)[None, :]
    N = tl.cdiv(T, BT)
    if START:
        S = tl.load(start + (row * H + h) * (K * V) + here, mask=inside, other=0.0)
    else:
        S = tl.zeros((KP, BV), tl.float32)
    dtype = w.dtype.element_ty
    for n in range(0, N):
        t = n * BT + i
        token = row * T + t
        last = row * T + tl.minimum(n * BT + BT, T) - 1
        tl.store(states + ((row * N + n) * H + h) * (K * V) + here, S, mask=inside)
        reader = tl.load(
            w + (token * H + h)[:, None] * K + d[None, :], mask=(t < T)[:, None] & (d < K)[None, :], other=0.0
        )
        key = tl.load(
            tail + (token * (H // R) + h // R)[None, :] * K + d[:, None],
            mask=(t < T)[None, :] & (d < K)[:, None], other=0.0,
        )  # fmt: skip
        here_v = (token * H + h)[:, None] * V + e[None, :]
        inside_v = (t < T)[:, None] & (e < V)[None, :]
        value = tl.load(u + here_v, mask=inside_v, other=0.0).to(tl.float32)
        value -= tl.dot(reader, S.to(dtype), input_precision=PRECISION)
        tl.store(written + here_v, value, mask=inside_v)
        if DECAY == 1:
            total = tl.load(b + token * H + h, mask=t < T, other=0.0)
            end = tl.load(b + last * H + h)
            value *= tl.exp(tl.minimum(end - total, 0.0))[:, None]
            S *= tl.exp(end)
        if DECAY == 2:
            S *= tl.exp(tl.load(b + (last * H + h) * K + d, mask=d < K, other=0.0))[:, None]
        if DOCS:
            before, final_doc = chunk_ends(docs, row, n, T, BT)
            doc = tl.load(docs + token, mask=t < T, other=0)
            value = tl.where((doc == final_doc)[:, None], value, 0.0)
            S = tl.where(before == final_doc, S, 0.0)
        S = tl.dot(key, value.to(dtype), S, input_precision=PRECISION)
    tl.store(final + (row * H + h) * (K * V) + here, S, mask=inside)


@triton.jit(do_not_specialize=["scale"])
def delta_rule_output(
    q, b, P, docs, states, written, o, scale, T, H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DECAY: tl.constexpr, DOCS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Some columns of the output of one chunk and head."""
    n, bh = tl.program_id(1), tl.program_id(2)
    row, h = (bh // H).to(tl.int64), bh % H
    i, e = tl.arange(0, BT), tl.program_id(0) * BV + tl.arange(0, BV)
    t = n * BT + i
    token = row * T + t
    state = states + ((row * tl.cdiv(T, BT) + n) * H + h) * (K * V)
    out = tl.zeros((BT, BV), tl.float32)
    for tile in range(0, (K + BK - 1) // BK):
        d = tile * BK + tl.arange(0, BK)
        inside = (t < T)[:, None] & (d < K)[None, :]
        query = tl.load(q + (token * (H // R) + h // R)[:, None] * K + d[None, :], mask=inside, other=0.0)
        S = tl.load(state + d[:, None] * V + e[None, :], mask=(d < K)[:, None] & (e < V)[None, :], other=0.0)
        if DECAY == 2:
            total = tl.load(b + (token * H + h)[:, None] * K + d[None, :], mask=inside, other=0.0)
            query = (query * tl.exp(total)).to(query.dtype)
        out = tl.dot(query, S.to(query.dtype), out, input_precision=PRECISION)
    if DECAY == 1:
        out *= tl.exp(tl.load(b + token * H + h, mask=t < T, other=0.0))[:, None]
    if DOCS:
        before, _ = chunk_ends(docs, row, n, T, BT)
        out = tl.where((tl.load(docs + token, mask=t < T, other=0) == before)[:, None], out, 0.0)
    weights = tl.load(P + (token * H + h)[:, None] * BT + i[None, :], mask=(t < T)[:, None], other=0.0)
    here = (token * H + h)[:, None] * V + e[None, :]
    inside_v = (t < T)[:, None] & (e < V)[None, :]
    value = tl.load(written + here, mask=inside_v, other=0.0)
    out = tl.dot(weights, value, out, input_precision=PRECISION)
    tl.store(o + here, out * scale, mask=inside_v)


# ------------------------------------------------------------------------------------------------------- launches


def lean(options: dict[str, int], q: Tensor) -> dict[str, int]:
    """Options of a kernel that holds whole keys: wide ones are not loaded ahead, there is no shared memory for it."""
    return options | {"num_stages": 1} if q.shape[3] * q.element_size() > 256 else options


def forward(q, k, v, beta, log_decay, initial_state, docs, scale, interval, o, final, states) -> None:
    """Fill o, final and (unless None) states [B, chunks, H, K, V]. Gates and states: float32; q, k, v, o of one dtype;
    all contiguous."""
    (B, T, H, V), K, s = v.shape, q.shape[3], constants(q, v)
    if states is None and T < FEW:
        return triton_step.forward(q, k, v, beta, log_decay, initial_state, docs, scale, o, final)
    N = triton.cdiv(T, CHUNK)
    states = final.new_empty(B, N, H, K, V) if states is None else states
    modes, written = {"DECAY": kind(log_decay), "DOCS": docs is not None}, torch.empty_like(v)
    with gpu.launching(q):
        f = factors(q, k, v, beta, log_decay, docs, read=False)
        options = lean(fit(gpu.options("delta_rule_states", q, STATES, K=K, V=V), BV=V), q)
        delta_rule_states[triton.cdiv(V, options["BV"]), B * H](
            f.tail, f.w, f.u, f.b, initial_state, docs, states, written, final, T, START=initial_state is not None,
            KP=triton_step.padded(K), **modes, **(s | {"R": H // f.tail.shape[2]}), **options,
        )  # fmt: skip
        options = fit(gpu.options("delta_rule_output", q, OUTPUT, K=K, V=V), BK=K, BV=V)
        grid = (triton.cdiv(V, options["BV"]), N, B * H)
        delta_rule_output[grid](q, f.b, f.P, docs, states, written, o, scale, T, **modes, **s, **options)


def backward(*args) -> tuple[Tensor, ...]:
    """See triton_backward.py."""
    from zoo.kernels.delta_rule import triton_backward

    return triton_backward.backward(*args)


def step(q, k, v, beta, log_decay, initial_state, scale) -> tuple[Tensor, Tensor]:
    """Output and state after one token."""
    B, _, H, V = v.shape
    o, final = torch.empty_like(v), v.new_empty(B, H, q.shape[3], V, dtype=wide(v.dtype))
    triton_step.forward(q, k, v, beta, log_decay, initial_state, None, scale, o, final)
    return o, final


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, scale: float,
    initial_state: Tensor | None, doc_ids: Tensor | None, chunk_size: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `zoo.kernels.delta_rule.delta_rule`. Products are formed in the dtype of v."""
    q, k = q.to(v.dtype), k.to(v.dtype)
    return fused.delta_rule(
        q, k, v, beta, log_decay, float(scale), initial_state, doc_ids, chunk_size, CHUNK, sys.modules[__name__]
    )


def launches() -> Iterator[tuple[str, Callable[[], None]]]:
    """What tools/aot.py compiles: realistic calls on meta tensors, forward, backward and one token."""

    def call(name, G, H, K, V, decay, docs=False):
        B, T = 2, 4096
        q = torch.empty(B, T, G, K, dtype=torch.bfloat16, device="meta")
        v, state = q.new_empty(B, T, H, V), q.new_empty(B, H, K, V, dtype=torch.float32)
        beta = state.new_empty(B, T, H)
        g = None if decay is None else state.new_empty((B, T, H, K)[: 3 if decay == "head" else 4])
        ids = q.new_empty(B, T, dtype=torch.int64) if docs else None
        states = state.new_empty(B, T // CHUNK, H, K, V)

        def both():
            forward(q, q, v, beta, g, state, ids, 0.5, CHUNK, torch.empty_like(v), state, states)
            backward(v, state, q, q, v, beta, g, ids, states, 0.5, CHUNK)

        yield f"{name} {K}x{V}", both
        one = [x if x is None else x[:, :1] for x in (q, q, v, beta, g)]
        yield f"{name} {K}x{V} step", lambda: step(*one, state, 0.5)

    yield from call("head", 4, 8, 128, 128, "head")
    yield from call("channel, documents", 4, 4, 128, 128, "channel", docs=True)
    yield from call("head, documents", 4, 4, 64, 64, "head", docs=True)
