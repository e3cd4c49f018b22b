"""Linear attention in Triton, forward (backward: triton_backward.py). Chunks of 64 tokens, in this order:

    sums      b = cumulative log-decays of each chunk
    states    the state before each chunk, S <- e^{b_C} S + (k e^{b_C - b})^T v, sequential over the chunks
    weights   A_ij = sum_d q_id k_jd e^{b_id - b_jd}, only for a decay per channel
    output    o = scale (A v + (q e^b) S), with A = (q k^T) e^{b_i - b_j} where the decay is per head

A decay per channel is split as in `zoo.kernels.chunking.vector_decayed_scores`: pairs whose halves part at a border of
1, 2, .. 32 tokens take their decay from that border, so that each level is one matrix product and one exponential of
a number <= 0 for every token and channel.

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
from zoo.kernels.linear_attention import fused
from zoo.kernels.linear_attention.cost import INTERVAL

CHUNK = INTERVAL
LEVELS = 6  # 2^6 tokens in a chunk

SUMS = [{"BW": 32, "num_warps": 4, "num_stages": 2}]
STATES = [
    {"BK": 64, "BV": 32, "num_warps": 4, "num_stages": 2},
    {"BK": 64, "BV": 64, "num_warps": 8, "num_stages": 2},
]
WEIGHTS = [{"BK": 32, "num_warps": 4, "num_stages": 1}, {"BK": 64, "num_warps": 8, "num_stages": 1}]
OUTPUT = [
    {"BK": 32, "BV": 64, "num_warps": 4, "num_stages": 2},
    {"BK": 64, "BV": 64, "num_warps": 8, "num_stages": 2},
]
STEP = [{"BK": 32, "BV": 64, "num_warps": 4, "num_stages": 2}]


@triton.jit
def linear_attention_sums(g, b, T, W, BT: tl.constexpr, BW: tl.constexpr):
    """b[t] = sum of g over the tokens of t's chunk up to t; both [B, T, W]."""
    chunk, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    t, w = chunk * BT + tl.arange(0, BT), tl.program_id(0) * BW + tl.arange(0, BW)
    at = (row * T + t)[:, None] * W + w[None, :]
    inside = (t < T)[:, None] & (w < W)[None, :]
    tl.store(b + at, tl.cumsum(tl.load(g + at, mask=inside, other=0.0), 0), mask=inside)


@triton.jit
def chunk_ends(docs, row, n, T, BT: tl.constexpr):
    """Documents of the token before chunk n (its first one for chunk 0) and of its last token."""
    before = tl.load(docs + row * T + tl.maximum(n * BT - 1, 0))
    return before, tl.load(docs + row * T + tl.minimum(n * BT + BT, T) - 1)


@triton.jit
def linear_attention_states(
    k, v, b, start, docs, states, final, T, H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DECAY: tl.constexpr, DOCS: tl.constexpr,
    START: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of the states of one head, chunk after chunk."""
    NV: tl.constexpr = (V + BV - 1) // BV
    tile, bh = tl.program_id(0), tl.program_id(1)
    row, h = (bh // H).to(tl.int64), bh % H
    d, e = (tile // NV) * BK + tl.arange(0, BK), (tile % NV) * BV + tl.arange(0, BV)
    here = d[:, None] * V + e[None, :]
    inside = (d < K)[:, None] & (e < V)[None, :]
    N = tl.cdiv(T, BT)
    if START:
        S = tl.load(start + (row * H + h) * (K * V) + here, mask=inside, other=0.0)
    else:
        S = tl.zeros((BK, BV), tl.float32)
    for n in range(0, N):
        t = n * BT + tl.arange(0, BT)
        token = row * T + t
        last = row * T + tl.minimum(n * BT + BT, T) - 1
        tl.store(states + ((row * N + n) * H + h) * (K * V) + here, S, mask=inside)
        key = tl.load(
            k + (token * (H // R) + h // R)[None, :] * K + d[:, None],
            mask=(t < T)[None, :] & (d < K)[:, None], other=0.0,
        )  # fmt: skip
        value = tl.load(
            v + (token * H + h)[:, None] * V + e[None, :], mask=(t < T)[:, None] & (e < V)[None, :], other=0.0
        )
        write = tl.full((1, BT), 1.0, tl.float32)
        if DECAY == 1:
            sums = tl.load(b + token * H + h, mask=t < T, other=0.0)
            end = tl.load(b + last * H + h)
            write = tl.exp(tl.minimum(end - sums, 0.0))[None, :]
            S *= tl.exp(end)
        if DECAY == 2:
            sums = tl.load(
                b + (token * H + h)[None, :] * K + d[:, None], mask=(t < T)[None, :] & (d < K)[:, None], other=0.0
            )
            end = tl.load(b + (last * H + h) * K + d, mask=d < K, other=0.0)
            write = tl.exp(tl.minimum(end[:, None] - sums, 0.0))
            S *= tl.exp(end)[:, None]
        if DOCS:
            before, final_doc = chunk_ends(docs, row, n, T, BT)
            doc = tl.load(docs + token, mask=t < T, other=0)
            write = tl.where((doc == final_doc)[None, :], write, 0.0)
            S = tl.where(before == final_doc, S, 0.0)
        S = tl.dot((key * write).to(key.dtype), value.to(key.dtype), S, input_precision=PRECISION)
    tl.store(final + (row * H + h) * (K * V) + here, S, mask=inside)


@triton.jit
def linear_attention_weights(
    q, k, b, docs, A, T, H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    LEVELS: tl.constexpr, DOCS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A [B, T, H, BT] of one chunk and head, for a decay per channel."""
    n, bh = tl.program_id(0), tl.program_id(1)
    row, h = (bh // H).to(tl.int64), bh % H
    i = tl.arange(0, BT)
    t = n * BT + i
    token = row * T + t
    total, diagonal = tl.zeros((BT, BT), tl.float32), tl.zeros((BT,), tl.float32)
    for tile in range(0, (K + BK - 1) // BK):
        d = tile * BK + tl.arange(0, BK)
        inside = (t < T)[:, None] & (d < K)[None, :]
        shared = (token * (H // R) + h // R)[:, None] * K + d[None, :]
        query = tl.load(q + shared, mask=inside, other=0.0)
        key = tl.load(k + shared, mask=inside, other=0.0)
        sums = tl.load(b + (token * H + h)[:, None] * K + d[None, :], mask=inside, other=0.0)
        diagonal += tl.sum(query.to(tl.float32) * key.to(tl.float32), 1)
        for level in range(0, LEVELS):
            pair = i >> (level + 1)
            late = ((i >> level) & 1) == 1
            border = n * BT + (pair << (level + 1)) + (1 << level) - 1
            middle = tl.load(
                b + ((row * T + border) * H + h)[:, None] * K + d[None, :],
                mask=(border < T)[:, None] & (d < K)[None, :], other=0.0,
            )  # fmt: skip
            decay = tl.exp(tl.minimum(tl.where(late[:, None], sums - middle, middle - sums), 0.0))
            left = tl.where(late[:, None], query * decay, 0.0).to(query.dtype)
            right = tl.where(late[:, None], 0.0, key * decay).to(query.dtype)
            part = tl.dot(left, tl.trans(right), input_precision=PRECISION)
            total += tl.where(pair[:, None] == pair[None, :], part, 0.0)
    total = tl.where(i[:, None] == i[None, :], diagonal[:, None], total)
    if DOCS:
        doc = tl.load(docs + token, mask=t < T, other=0)
        total = tl.where(doc[:, None] == doc[None, :], total, 0.0)
    tl.store(A + (token * H + h)[:, None] * BT + i[None, :], total, mask=(t < T)[:, None])


@triton.jit(do_not_specialize=["scale"])
def linear_attention_output(
    q, k, v, b, A, docs, states, o, scale, T, H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
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
    past, scores = tl.zeros((BT, BV), tl.float32), tl.zeros((BT, BT), tl.float32)
    for tile in range(0, (K + BK - 1) // BK):
        d = tile * BK + tl.arange(0, BK)
        inside = (t < T)[:, None] & (d < K)[None, :]
        shared = (token * (H // R) + h // R)[:, None] * K + d[None, :]
        query = tl.load(q + shared, mask=inside, other=0.0)
        S = tl.load(state + d[:, None] * V + e[None, :], mask=(d < K)[:, None] & (e < V)[None, :], other=0.0)
        if DECAY == 2:
            sums = tl.load(b + (token * H + h)[:, None] * K + d[None, :], mask=inside, other=0.0)
            query = (query * tl.exp(sums)).to(query.dtype)
        else:
            key = tl.load(k + shared, mask=inside, other=0.0)
            scores = tl.dot(query, tl.trans(key), scores, input_precision=PRECISION)
        past = tl.dot(query, S.to(query.dtype), past, input_precision=PRECISION)
    allowed = i[:, None] >= i[None, :]
    if DOCS:
        before, _ = chunk_ends(docs, row, n, T, BT)
        doc = tl.load(docs + token, mask=t < T, other=0)
        allowed = allowed & (doc[:, None] == doc[None, :])
        past = tl.where((doc == before)[:, None], past, 0.0)
    if DECAY == 2:
        scores = tl.load(A + (token * H + h)[:, None] * BT + i[None, :], mask=(t < T)[:, None], other=0.0)
    else:
        if DECAY == 1:
            sums = tl.load(b + token * H + h, mask=t < T, other=0.0)
            scores *= tl.exp(tl.where(allowed, tl.minimum(sums[:, None] - sums[None, :], 0.0), -float("inf")))
            past *= tl.exp(sums)[:, None]
        scores = tl.where(allowed, scores, 0.0)
    here = (token * H + h)[:, None] * V + e[None, :]
    inside_v = (t < T)[:, None] & (e < V)[None, :]
    value = tl.load(v + here, mask=inside_v, other=0.0)
    kind = q.dtype.element_ty
    past = tl.dot(scores.to(kind), value.to(kind), past, input_precision=PRECISION)
    tl.store(o + here, past * scale, mask=inside_v)


@triton.jit(do_not_specialize=["scale"])
def linear_attention_step(
    q, k, v, g, start, o, final, scale, H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, DECAY: tl.constexpr, START: tl.constexpr,
):  # fmt: skip
    """One token: each element of the state is read and written once."""
    bh = tl.program_id(1).to(tl.int64)
    e = tl.program_id(0) * BV + tl.arange(0, BV)
    shared = (bh // H * (H // R) + bh % H // R) * K
    value = tl.load(v + bh * V + e, mask=e < V, other=0.0).to(tl.float32)
    out = tl.zeros((BV,), tl.float32)
    for tile in range(0, (K + BK - 1) // BK):
        d = tile * BK + tl.arange(0, BK)
        query = tl.load(q + shared + d, mask=d < K, other=0.0).to(tl.float32)
        key = tl.load(k + shared + d, mask=d < K, other=0.0).to(tl.float32)
        S = key[:, None] * value[None, :]
        here = bh * (K * V) + d[:, None] * V + e[None, :]
        inside = (d < K)[:, None] & (e < V)[None, :]
        if START:
            old = tl.load(start + here, mask=inside, other=0.0)
            if DECAY == 1:
                old *= tl.exp(tl.load(g + bh))
            if DECAY == 2:
                old *= tl.exp(tl.load(g + bh * K + d, mask=d < K, other=0.0))[:, None]
            S += old
        tl.store(final + here, S, mask=inside)
        out += tl.sum(S * query[:, None], 0)
    tl.store(o + bh * V + e, out * scale, mask=e < V)


# ------------------------------------------------------------------------------------------------------- launches


def fit(options: dict[str, int], **dims: int) -> dict[str, int]:
    """Options with blocks no wider than the dimensions they tile, and at least 16."""
    limits = {name: max(16, triton.next_power_of_2(dim)) for name, dim in dims.items()}
    return {name: min(n, limits.get(name, n)) for name, n in options.items()}


def shapes(q: Tensor, v: Tensor) -> dict[str, int]:
    """What every kernel is compiled for."""
    precision = "ieee" if q.dtype == torch.float32 else "tf32"  # the latter says nothing for half precision
    return {
        "H": v.shape[2], "R": v.shape[2] // q.shape[2], "K": q.shape[3], "V": v.shape[3], "BT": CHUNK,
        "PRECISION": precision,
    }  # fmt: skip


def per_token(log_decay: Tensor | None, v: Tensor) -> Tensor | None:
    """[B, T, H] for a constant decay."""
    if log_decay is None or log_decay.ndim > 1:
        return log_decay
    return log_decay.expand(v.shape[:3]).contiguous()


def kind(log_decay: Tensor | None) -> int:
    """DECAY of the kernels."""
    return 0 if log_decay is None else log_decay.ndim - 2


def sums(g: Tensor | None) -> Tensor | None:
    """Cumulative log-decays of each chunk."""
    if g is None:
        return None
    b, (B, T), W = torch.empty_like(g), g.shape[:2], g.shape[2:].numel()
    options = gpu.options("linear_attention_sums", g, SUMS)
    grid = (triton.cdiv(W, options["BW"]), triton.cdiv(T, CHUNK), B)
    linear_attention_sums[grid](g, b, T, W, BT=CHUNK, **options)
    return b


def weights(q: Tensor, k: Tensor, v: Tensor, b: Tensor | None, docs: Tensor | None) -> Tensor | None:
    """Weights of the pairs of each chunk, where the decay is per channel."""
    if kind(b) < 2:
        return None
    (B, T, H), s = v.shape[:3], shapes(q, v)
    s.pop("V")
    A = q.new_empty(B, T, H, CHUNK)
    options = fit(gpu.options("linear_attention_weights", q, WEIGHTS, K=s["K"]), BK=s["K"])
    grid = (triton.cdiv(T, CHUNK), B * H)
    linear_attention_weights[grid](q, k, b, docs, A, T, LEVELS=LEVELS, DOCS=docs is not None, **s, **options)
    return A


def forward(q, k, v, log_decay, initial_state, docs, scale, interval, o, final, states) -> None:
    """Fill o, final and (unless None) states [B, chunks, H, K, V]."""
    (B, T, H, V), K, s = v.shape, q.shape[3], shapes(q, v)
    N = triton.cdiv(T, CHUNK)
    states = final.new_empty(B, N, H, K, V) if states is None else states
    modes = {"DECAY": kind(g := per_token(log_decay, v)), "DOCS": docs is not None}
    with gpu.launching(q):
        b = sums(g)
        options = fit(gpu.options("linear_attention_states", q, STATES, K=K, V=V), BK=K, BV=V)
        grid = (triton.cdiv(K, options["BK"]) * triton.cdiv(V, options["BV"]), B * H)
        linear_attention_states[grid](
            k, v, b, initial_state, docs, states, final, T, START=initial_state is not None, **modes, **s, **options
        )
        A = weights(q, k, v, b, docs)
        options = fit(gpu.options("linear_attention_output", q, OUTPUT, K=K, V=V), BK=K, BV=V)
        grid = (triton.cdiv(V, options["BV"]), N, B * H)
        linear_attention_output[grid](q, k, v, b, A, docs, states, o, scale, T, **modes, **s, **options)


def step(q, k, v, log_decay, initial_state, scale) -> tuple[Tensor, Tensor]:
    """Output and state after one token."""
    (B, _, H, V), K, s = v.shape, q.shape[3], shapes(q, v)
    g, o = per_token(log_decay, v), torch.empty_like(v)
    final = v.new_empty(B, H, K, V, dtype=wide(v.dtype))
    options = fit(gpu.options("linear_attention_step", q, STEP, K=K, V=V), BK=K, BV=V)
    sizes = {name: s[name] for name in ("H", "R", "K", "V")}
    with gpu.launching(q):
        linear_attention_step[triton.cdiv(V, options["BV"]), B * H](
            q, k, v, g, initial_state, o, final, scale, DECAY=kind(g), START=initial_state is not None,
            **sizes, **options,
        )  # fmt: skip
    return o, final


def backward(*args) -> tuple[Tensor, ...]:
    """See triton_backward.py."""
    from zoo.kernels.linear_attention import triton_backward

    return triton_backward.backward(*args)


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, scale: float, initial_state: Tensor | None,
    doc_ids: Tensor | None, chunk_size: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `zoo.kernels.linear_attention.linear_attention`. Products are formed in the dtype of q."""
    return fused.linear_attention(
        q, k.to(q.dtype), v, log_decay, float(scale), initial_state, doc_ids, chunk_size, CHUNK, sys.modules[__name__]
    )


def launches() -> Iterator[tuple[str, Callable[[], None]]]:
    """What tools/aot.py compiles: realistic calls on meta tensors, forward, backward and one token."""

    def call(name, G, H, K, V, decay, docs=False):
        B, T = 2, 4096
        q = torch.empty(B, T, G, K, dtype=torch.bfloat16, device="meta")
        v, state = q.new_empty(B, T, H, V), q.new_empty(B, H, K, V, dtype=torch.float32)
        g = None if decay is None else state.new_empty((B, T, H, K)[: 3 if decay == "head" else 4])
        ids = q.new_empty(B, T, dtype=torch.int64) if docs else None
        states = state.new_empty(B, T // CHUNK, H, K, V)

        def both():
            forward(q, q, v, g, state, ids, 0.5, CHUNK, torch.empty_like(v), state, states)
            backward(v, state, q, q, v, g, ids, states, 0.5, CHUNK)

        yield f"{name} {K}x{V}", both
        one = [x if x is None else x[:, :1] for x in (q, q, v, g)]
        yield f"{name} {K}x{V} step", lambda: step(*one, state, 0.5)

    yield from call("head", 1, 16, 128, 64, "head")
    yield from call("channel, documents", 4, 4, 128, 128, "channel", docs=True)
