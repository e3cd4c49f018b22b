"""Gradients of linear attention in Triton, from the states that forward saved:

states    dS, the gradient of the state after each chunk: dS <- e^{b_C} dS + scale (q e^b)^T do, in reverse
values    dv = scale A^T do + (k e^{b_C - b}) dS
keys      dA = do v^T; dq = scale (dA D) k + scale e^b (do S^T); dk = scale (dA D)^T q + e^{b_C - b} (v dS^T),
          D the decays of the pairs. The gradient of the log-decay of token t is what crosses from before t to
          t or later: pairs, from the state before the chunk, into the state after it, and from one to the other.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels import gpu
from zoo.kernels.linear_attention.triton import CHUNK, LEVELS, chunk_ends, fit, kind, per_token, shapes, sums, weights

STATES = [
    {"BK": 64, "BV": 32, "num_warps": 4, "num_stages": 2},
    {"BK": 64, "BV": 64, "num_warps": 8, "num_stages": 2},
]
VALUES = [
    {"BK": 32, "BV": 64, "num_warps": 4, "num_stages": 2},
    {"BK": 64, "BV": 64, "num_warps": 8, "num_stages": 2},
]
KEYS = [{"BK": 32, "BV": 32, "num_warps": 8, "num_stages": 1}, {"BK": 32, "BV": 32, "num_warps": 4, "num_stages": 1}]


@triton.jit(do_not_specialize=["scale"])
def linear_attention_states_backward(
    q, grad_o, b, grad_final, docs, grads, grad_start, scale, T, H: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DECAY: tl.constexpr, DOCS: tl.constexpr,
    FINAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of the gradients of the states of one head, chunk after chunk in reverse."""
    NV: tl.constexpr = (V + BV - 1) // BV
    tile, bh = tl.program_id(0), tl.program_id(1)
    row, h = (bh // H).to(tl.int64), bh % H
    d, e = (tile // NV) * BK + tl.arange(0, BK), (tile % NV) * BV + tl.arange(0, BV)
    here = d[:, None] * V + e[None, :]
    inside = (d < K)[:, None] & (e < V)[None, :]
    N = tl.cdiv(T, BT)
    if FINAL:
        dS = tl.load(grad_final + (row * H + h) * (K * V) + here, mask=inside, other=0.0)
    else:
        dS = tl.zeros((BK, BV), tl.float32)
    for m in range(0, N):
        n = N - 1 - m
        t = n * BT + tl.arange(0, BT)
        token = row * T + t
        last = row * T + tl.minimum(n * BT + BT, T) - 1
        tl.store(grads + ((row * N + n) * H + h) * (K * V) + here, dS, mask=inside)
        query = tl.load(
            q + (token * (H // R) + h // R)[None, :] * K + d[:, None],
            mask=(t < T)[None, :] & (d < K)[:, None], other=0.0,
        )  # fmt: skip
        do = tl.load(
            grad_o + (token * H + h)[:, None] * V + e[None, :], mask=(t < T)[:, None] & (e < V)[None, :], other=0.0
        )
        read = tl.full((1, BT), 1.0, tl.float32) * scale
        if DECAY == 1:
            read *= tl.exp(tl.load(b + token * H + h, mask=t < T, other=0.0))[None, :]
            dS *= tl.exp(tl.load(b + last * H + h))
        if DECAY == 2:
            inside_k = (t < T)[None, :] & (d < K)[:, None]
            read = read * tl.exp(tl.load(b + (token * H + h)[None, :] * K + d[:, None], mask=inside_k, other=0.0))
            dS *= tl.exp(tl.load(b + (last * H + h) * K + d, mask=d < K, other=0.0))[:, None]
        if DOCS:
            before, final_doc = chunk_ends(docs, row, n, T, BT)
            doc = tl.load(docs + token, mask=t < T, other=0)
            read = tl.where((doc == before)[None, :], read, 0.0)
            dS = tl.where(before == final_doc, dS, 0.0)
        dS = tl.dot((query * read).to(query.dtype), do.to(query.dtype), dS, input_precision=PRECISION)
    tl.store(grad_start + (row * H + h) * (K * V) + here, dS, mask=inside)


@triton.jit(do_not_specialize=["scale"])
def linear_attention_values_backward(
    q, k, grad_o, b, A, docs, grads, dv, scale, T, H: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DECAY: tl.constexpr, DOCS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Some columns of dv of one chunk and head. Pairs are [key, query] here."""
    n, bh = tl.program_id(1), tl.program_id(2)
    row, h = (bh // H).to(tl.int64), bh % H
    j, e = tl.arange(0, BT), tl.program_id(0) * BV + tl.arange(0, BV)
    t = n * BT + j
    token = row * T + t
    last = row * T + tl.minimum(n * BT + BT, T) - 1
    grad = grads + ((row * tl.cdiv(T, BT) + n) * H + h) * (K * V)
    future, scores = tl.zeros((BT, BV), tl.float32), tl.zeros((BT, BT), tl.float32)
    for tile in range(0, (K + BK - 1) // BK):
        d = tile * BK + tl.arange(0, BK)
        inside = (t < T)[:, None] & (d < K)[None, :]
        shared = (token * (H // R) + h // R)[:, None] * K + d[None, :]
        key = tl.load(k + shared, mask=inside, other=0.0)
        dS = tl.load(grad + d[:, None] * V + e[None, :], mask=(d < K)[:, None] & (e < V)[None, :], other=0.0)
        if DECAY == 2:
            sums = tl.load(b + (token * H + h)[:, None] * K + d[None, :], mask=inside, other=0.0)
            end = tl.load(b + (last * H + h) * K + d, mask=d < K, other=0.0)
            key = (key * tl.exp(tl.minimum(end[None, :] - sums, 0.0))).to(key.dtype)
        else:
            query = tl.load(q + shared, mask=inside, other=0.0)
            scores = tl.dot(key, tl.trans(query), scores, input_precision=PRECISION)
        future = tl.dot(key, dS.to(key.dtype), future, input_precision=PRECISION)
    allowed = j[:, None] <= j[None, :]
    if DOCS:
        _, final_doc = chunk_ends(docs, row, n, T, BT)
        doc = tl.load(docs + token, mask=t < T, other=0)
        allowed = allowed & (doc[:, None] == doc[None, :])
        future = tl.where((doc == final_doc)[:, None], future, 0.0)
    if DECAY == 2:
        scores = tl.load(A + (token * H + h)[None, :] * BT + j[:, None], mask=(t < T)[None, :], other=0.0)
    else:
        if DECAY == 1:
            sums = tl.load(b + token * H + h, mask=t < T, other=0.0)
            scores *= tl.exp(tl.where(allowed, tl.minimum(sums[None, :] - sums[:, None], 0.0), -float("inf")))
            future *= tl.exp(tl.minimum(tl.load(b + last * H + h) - sums, 0.0))[:, None]
        scores = tl.where(allowed, scores, 0.0)
    here = (token * H + h)[:, None] * V + e[None, :]
    inside_v = (t < T)[:, None] & (e < V)[None, :]
    do = tl.load(grad_o + here, mask=inside_v, other=0.0)
    kind = q.dtype.element_ty
    future = tl.dot((scores * scale).to(kind), do.to(kind), future, input_precision=PRECISION)
    tl.store(dv + here, future, mask=inside_v)


@triton.jit(do_not_specialize=["scale"])
def linear_attention_keys_backward(
    q, k, v, grad_o, b, docs, states, grads, dq, dk, dg, scale, B, T, H: tl.constexpr, R: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, LEVELS: tl.constexpr,
    DECAY: tl.constexpr, DOCS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Some channels of dq and dk [B, T, H, K] of one chunk and head, and of dg: [B, T, H, K], or for a decay per head
    what these channels add to it, [tiles, B, T, H]."""
    n, bh = tl.program_id(1), tl.program_id(2)
    row, h = (bh // H).to(tl.int64), bh % H
    i, d = tl.arange(0, BT), tl.program_id(0) * BK + tl.arange(0, BK)
    t = n * BT + i
    token = row * T + t
    last = row * T + tl.minimum(n * BT + BT, T) - 1
    kind = q.dtype.element_ty
    matrix = ((row * tl.cdiv(T, BT) + n) * H + h) * (K * V)
    dA, diagonal = tl.zeros((BT, BT), tl.float32), tl.zeros((BT,), tl.float32)
    past, future = tl.zeros((BT, BK), tl.float32), tl.zeros((BT, BK), tl.float32)
    across = tl.zeros((BK,), tl.float32)
    for tile in range(0, (V + BV - 1) // BV):
        e = tile * BV + tl.arange(0, BV)
        here = (token * H + h)[:, None] * V + e[None, :]
        inside_v = (t < T)[:, None] & (e < V)[None, :]
        do = tl.load(grad_o + here, mask=inside_v, other=0.0)
        value = tl.load(v + here, mask=inside_v, other=0.0)
        turned = matrix + d[None, :] * V + e[:, None]  # [BV, BK]
        inside_s = (d < K)[None, :] & (e < V)[:, None]
        S = tl.load(states + turned, mask=inside_s, other=0.0)
        dS = tl.load(grads + turned, mask=inside_s, other=0.0)
        diagonal += tl.sum(do.to(tl.float32) * value.to(tl.float32), 1)
        across += tl.sum(S * dS, 0)
        do, value = do.to(kind), value.to(kind)
        dA = tl.dot(do, tl.trans(value), dA, input_precision=PRECISION)
        past = tl.dot(do, S.to(kind), past, input_precision=PRECISION)
        future = tl.dot(value, dS.to(kind), future, input_precision=PRECISION)
    inside = (t < T)[:, None] & (d < K)[None, :]
    shared = (token * (H // R) + h // R)[:, None] * K + d[None, :]
    query = tl.load(q + shared, mask=inside, other=0.0)
    key = tl.load(k + shared, mask=inside, other=0.0)
    below = i[:, None] > i[None, :]  # the diagonal has no decay: it stays out of what dg is made of
    past *= scale
    if DOCS:
        before, final_doc = chunk_ends(docs, row, n, T, BT)
        doc = tl.load(docs + token, mask=t < T, other=0)
        below = below & (doc[:, None] == doc[None, :])
        past = tl.where((doc == before)[:, None], past, 0.0)
        future = tl.where((doc == final_doc)[:, None], future, 0.0)
        across = tl.where(before == final_doc, across, 0.0)
    dA = tl.where(below, dA * scale, 0.0)
    diagonal *= scale
    here_k = (token * H + h)[:, None] * K + d[None, :]
    if DECAY == 2:
        pairs_q, pairs_k = tl.zeros((BT, BK), tl.float32), tl.zeros((BT, BK), tl.float32)
        sums = tl.load(b + here_k, mask=inside, other=0.0)
        end = tl.load(b + (last * H + h) * K + d, mask=d < K, other=0.0)
        past *= tl.exp(sums)
        future *= tl.exp(tl.minimum(end[None, :] - sums, 0.0))
        across *= tl.exp(end)
        for level in range(0, LEVELS):
            pair = i >> (level + 1)
            late = (((i >> level) & 1) == 1)[:, None]
            border = n * BT + (pair << (level + 1)) + (1 << level) - 1
            middle = tl.load(
                b + ((row * T + border) * H + h)[:, None] * K + d[None, :],
                mask=(border < T)[:, None] & (d < K)[None, :], other=0.0,
            )  # fmt: skip
            decay = tl.exp(tl.minimum(tl.where(late, sums - middle, middle - sums), 0.0))
            part = tl.where(pair[:, None] == pair[None, :], dA, 0.0).to(kind)
            left = tl.where(late, query * decay, 0.0).to(kind)
            right = tl.where(late, 0.0, key * decay).to(kind)
            pairs_q += tl.where(late, decay, 0.0) * tl.dot(part, right, input_precision=PRECISION)
            pairs_k += tl.where(late, 0.0, decay) * tl.dot(tl.trans(part), left, input_precision=PRECISION)
    else:
        if DECAY == 1:
            sums = tl.load(b + token * H + h, mask=t < T, other=0.0)
            end = tl.load(b + last * H + h)
            past *= tl.exp(sums)[:, None]
            future *= tl.exp(tl.minimum(end - sums, 0.0))[:, None]
            across *= tl.exp(end)
            dA *= tl.exp(tl.where(below, tl.minimum(sums[:, None] - sums[None, :], 0.0), -float("inf")))
        pairs_q = tl.dot(dA.to(kind), key, input_precision=PRECISION)
        pairs_k = tl.dot(tl.trans(dA).to(kind), query, input_precision=PRECISION)
    tl.store(dq + here_k, past + pairs_q + diagonal[:, None] * key, mask=inside)
    tl.store(dk + here_k, future + pairs_k + diagonal[:, None] * query, mask=inside)
    if DECAY > 0:
        reaching = query * (past + pairs_q) - key * pairs_k
        leaving = key * future
        if DECAY == 2:  # sums over later and over earlier tokens as products with triangles of ones
            later = (i[:, None] <= i[None, :]).to(tl.float32)
            earlier = (i[:, None] > i[None, :]).to(tl.float32)
            total = tl.dot(later, reaching, input_precision="tf32x3")
            total = tl.dot(earlier, leaving, total, input_precision="tf32x3") + across[None, :]
            tl.store(dg + here_k, total, mask=inside)
        else:
            later = tl.where(i[:, None] >= i[None, :], tl.sum(reaching, 1)[:, None], 0.0)
            earlier = tl.where(i[:, None] < i[None, :], tl.sum(leaving, 1)[:, None], 0.0)
            total = tl.sum(later + earlier, 0) + tl.sum(across, 0)
            part_of = (tl.program_id(0) * B + row) * T + t
            tl.store(dg + part_of * H + h, total, mask=t < T)


def backward(grad_o, grad_final, q, k, v, log_decay, docs, states, scale, interval) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, log_decay (empty without one) and the initial state."""
    (B, T, H, V), (G, K), s = v.shape, q.shape[2:], shapes(q, v)
    g, N = per_token(log_decay, v), triton.cdiv(T, CHUNK)
    grads, start = torch.empty_like(states), states.new_empty(B, H, K, V)
    dq, dk, dv = q.new_empty(B, T, H, K), k.new_empty(B, T, H, K), torch.empty_like(v)
    modes = {"DECAY": kind(g), "DOCS": docs is not None}
    with gpu.launching(q):
        b = sums(g)
        options = fit(gpu.options("linear_attention_states_backward", q, STATES, K=K, V=V), BK=K, BV=V)
        grid = (triton.cdiv(K, options["BK"]) * triton.cdiv(V, options["BV"]), B * H)
        linear_attention_states_backward[grid](
            q,
            grad_o,
            b,
            grad_final,
            docs,
            grads,
            start,
            scale,
            T,
            FINAL=grad_final is not None,
            **modes,
            **s,
            **options,
        )
        A = weights(q, k, v, b, docs)
        options = fit(gpu.options("linear_attention_values_backward", q, VALUES, K=K, V=V), BK=K, BV=V)
        grid = (triton.cdiv(V, options["BV"]), N, B * H)
        linear_attention_values_backward[grid](q, k, grad_o, b, A, docs, grads, dv, scale, T, **modes, **s, **options)
        options = fit(gpu.options("linear_attention_keys_backward", q, KEYS, K=K, V=V), BK=K, BV=V)
        tiles = triton.cdiv(K, options["BK"])
        shape = {0: (0,), 1: (tiles, B, T, H), 2: (B, T, H, K)}[kind(g)]
        dg = states.new_empty(shape)
        linear_attention_keys_backward[tiles, N, B * H](
            q, k, v, grad_o, b, docs, states, grads, dq, dk, dg, scale, B, T, LEVELS=LEVELS, **modes, **s, **options
        )
    if G < H:
        dq, dk = (x.unflatten(2, (G, -1)).sum(3, dtype=torch.float32).to(x.dtype) for x in (dq, dk))
    if kind(g) == 1:
        dg = dg.sum((0, 1, 2)) if log_decay.ndim == 1 else dg.sum(0)
    return dq, dk, dv, dg, start
