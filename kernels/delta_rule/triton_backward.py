"""Gradients of the gated delta rule in Triton, from the states that forward saved. With everything of a chunk rebuilt
(triton_factors.py), `written` is to its tokens what v is to linear attention: q reads it, and k reads it with the
gradient -beta y of what the solve was given.

written   written = u - w S;  scale P^T do, what the chunk's own queries want of it
states    d written = that + (k e^{b_C - b}) dS;  dS <- e^{b_C} dS + scale (q e^b)^T do - w^T d written, in reverse
pairs     y = X^T d written;  dv = beta y;  dP = scale do written^T;  Y = y written^T, which is -dA
keys      dq = (dP D) k + scale e^b (do S^T);  dk as a reader = -beta z, z = (Y D) k + e^b (y S^T);
          dk as what is read = (dP D)^T q - (Y D)^T (beta k) + e^{b_C - b} (written dS^T), D the decays of the pairs;
          dbeta = y v - k z. The gradient of the log-decay of token t is what crosses from before t to t or later:
          pairs, from the state before the chunk, into the state after it, and from one to the other.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels import gpu
from zoo.kernels.delta_rule.triton import lean
from zoo.kernels.delta_rule.triton_factors import constants, factors
from zoo.kernels.delta_rule.triton_step import padded
from zoo.kernels.linear_attention.triton import CHUNK, LEVELS, chunk_ends, fit, kind

WRITTEN = [{"BK": 32, "BV": 64, "num_warps": 4, "num_stages": 2}]
STATES = [{"BV": 32, "num_warps": 4, "num_stages": 2}, {"BV": 64, "num_warps": 8, "num_stages": 2}]
PAIRS = [{"BV": 32, "num_warps": 4, "num_stages": 2}]
KEYS = [{"BK": 32, "BV": 32, "num_warps": 8, "num_stages": 1}, {"BK": 16, "BV": 32, "num_warps": 4, "num_stages": 1}]


@triton.jit(do_not_specialize=["scale"])
def delta_rule_written_backward(
    w, u, P, grad_o, states, written, grads, scale, T, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Some columns of what the tokens of one chunk and head write, and of its gradient (grads) by their own queries."""
    n, bh = tl.program_id(1), tl.program_id(2)
    row, h = (bh // H).to(tl.int64), bh % H
    i, e = tl.arange(0, BT), tl.program_id(0) * BV + tl.arange(0, BV)
    t = n * BT + i
    token = row * T + t
    state = states + ((row * tl.cdiv(T, BT) + n) * H + h) * (K * V)
    here = (token * H + h)[:, None] * V + e[None, :]
    inside_v = (t < T)[:, None] & (e < V)[None, :]
    held = tl.zeros((BT, BV), tl.float32)
    for tile in range(0, (K + BK - 1) // BK):
        d = tile * BK + tl.arange(0, BK)
        inside = (t < T)[:, None] & (d < K)[None, :]
        reader = tl.load(w + (token * H + h)[:, None] * K + d[None, :], mask=inside, other=0.0)
        S = tl.load(state + d[:, None] * V + e[None, :], mask=(d < K)[:, None] & (e < V)[None, :], other=0.0)
        held = tl.dot(reader, S.to(reader.dtype), held, input_precision=PRECISION)
    tl.store(written + here, tl.load(u + here, mask=inside_v, other=0.0) - held, mask=inside_v)
    weights = tl.load(P + (token * H + h)[None, :] * BT + i[:, None], mask=(t < T)[None, :], other=0.0)  # [key, query]
    do = tl.load(grad_o + here, mask=inside_v, other=0.0)
    tl.store(grads + here, tl.dot(weights, do, input_precision=PRECISION) * scale, mask=inside_v)


@triton.jit(do_not_specialize=["scale"])
def delta_rule_states_backward(
    tail, read, w, b, grad_o, grad_final, docs, grads, grad_states, grad_start, scale, T, H: tl.constexpr,
    R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, DOCS: tl.constexpr, FINAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Some value channels of the gradients of the states of one head, chunk after chunk in reverse; grads becomes the
    whole gradient of what is written. R heads share tail and read: see `delta_rule_states`."""
    bh = tl.program_id(1)
    row, h = (bh // H).to(tl.int64), bh % H
    i, d, e = tl.arange(0, BT), tl.arange(0, KP), tl.program_id(0) * BV + tl.arange(0, BV)
    here = d[:, None] * V + e[None, :]
    inside = (d < K)[:, None] & (e < V)[None, :]
    N = tl.cdiv(T, BT)
    if FINAL:
        dS = tl.load(grad_final + (row * H + h) * (K * V) + here, mask=inside, other=0.0)
    else:
        dS = tl.zeros((KP, BV), tl.float32)
    dtype = w.dtype.element_ty
    for m in range(0, N):
        n = N - 1 - m
        t = n * BT + i
        token = row * T + t
        last = row * T + tl.minimum(n * BT + BT, T) - 1
        tl.store(grad_states + ((row * N + n) * H + h) * (K * V) + here, dS, mask=inside)
        shared = (token * (H // R) + h // R) * K
        inside_k = (t < T)[None, :] & (d < K)[:, None]
        key = tl.load(tail + shared[:, None] + d[None, :], mask=(t < T)[:, None] & (d < K)[None, :], other=0.0)
        query = tl.load(read + shared[None, :] + d[:, None], mask=inside_k, other=0.0)
        reader = tl.load(w + (token * H + h)[None, :] * K + d[:, None], mask=inside_k, other=0.0)
        here_v = (token * H + h)[:, None] * V + e[None, :]
        inside_v = (t < T)[:, None] & (e < V)[None, :]
        do = tl.load(grad_o + here_v, mask=inside_v, other=0.0).to(tl.float32) * scale
        dw = tl.dot(key, dS.to(dtype), input_precision=PRECISION)
        if DECAY == 1:
            total = tl.load(b + token * H + h, mask=t < T, other=0.0)
            end = tl.load(b + last * H + h)
            dw *= tl.exp(tl.minimum(end - total, 0.0))[:, None]
            do *= tl.exp(total)[:, None]
            dS *= tl.exp(end)
        if DECAY == 2:
            dS *= tl.exp(tl.load(b + (last * H + h) * K + d, mask=d < K, other=0.0))[:, None]
        if DOCS:
            before, final_doc = chunk_ends(docs, row, n, T, BT)
            doc = tl.load(docs + token, mask=t < T, other=0)
            dw = tl.where((doc == final_doc)[:, None], dw, 0.0)
            do = tl.where((doc == before)[:, None], do, 0.0)
            dS = tl.where(before == final_doc, dS, 0.0)
        dw += tl.load(grads + here_v, mask=inside_v, other=0.0)
        tl.store(grads + here_v, dw, mask=inside_v)
        dS = tl.dot(query, do.to(dtype), dS, input_precision=PRECISION)
        dS = tl.dot(reader, (-dw).to(dtype), dS, input_precision=PRECISION)
    tl.store(grad_start + (row * H + h) * (K * V) + here, dS, mask=inside)


@triton.jit(do_not_specialize=["scale"])
def delta_rule_pairs_backward(
    v, beta, X, written, grads, grad_o, docs, y, dv, dP, Y, dbeta, scale, T, H: tl.constexpr, V: tl.constexpr,
    BT: tl.constexpr, BV: tl.constexpr, DOCS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of one chunk and head: y and dv [B, T, H, V]; dP and the strict lower Y = y written^T [B, T, H, BT], both without
    the decays of the pairs; y v, the first part of dbeta."""
    n, bh = tl.program_id(0), tl.program_id(1)
    row, h = (bh // H).to(tl.int64), bh % H
    i = tl.arange(0, BT)
    t = n * BT + i
    token = row * T + t
    pair = (token * H + h)[:, None] * BT + i[None, :]
    turned = tl.load(X + (token * H + h)[None, :] * BT + i[:, None], mask=(t < T)[None, :], other=0.0)
    rate = tl.load(beta + token * H + h, mask=t < T, other=0.0)
    reads, solves = tl.zeros((BT, BT), tl.float32), tl.zeros((BT, BT), tl.float32)
    first = tl.zeros((BT,), tl.float32)
    for tile in range(0, (V + BV - 1) // BV):
        e = tile * BV + tl.arange(0, BV)
        here = (token * H + h)[:, None] * V + e[None, :]
        inside = (t < T)[:, None] & (e < V)[None, :]
        value = tl.load(v + here, mask=inside, other=0.0)
        dw = tl.load(grads + here, mask=inside, other=0.0)
        put = tl.trans(tl.load(written + here, mask=inside, other=0.0))
        do = tl.load(grad_o + here, mask=inside, other=0.0)
        dx = tl.dot(turned, dw, input_precision=PRECISION)
        tl.store(y + here, dx, mask=inside)
        tl.store(dv + here, rate[:, None] * dx, mask=inside)
        dx = dx.to(do.dtype)  # as k z will have it: the two nearly cancel where memory predicts well
        first += tl.sum(dx.to(tl.float32) * value.to(tl.float32), 1)
        reads = tl.dot(do, put, reads, input_precision=PRECISION)
        solves = tl.dot(dx, put, solves, input_precision=PRECISION)
    allowed = i[:, None] >= i[None, :]
    if DOCS:
        doc = tl.load(docs + token, mask=t < T, other=0)
        allowed = allowed & (doc[:, None] == doc[None, :])
    tl.store(dP + pair, tl.where(allowed, reads * scale, 0.0), mask=(t < T)[:, None])
    solves = tl.where(allowed & (i[:, None] > i[None, :]), solves, 0.0)
    tl.store(Y + pair, solves, mask=(t < T)[:, None])
    tl.store(dbeta + token * H + h, first, mask=t < T)


@triton.jit(do_not_specialize=["scale"])
def delta_rule_keys_backward(
    q, k, b, beta, docs, written, y, grad_o, states, grad_states, dP, Y, dq, dk, dg, kz, scale, B, T, H: tl.constexpr,
    R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    LEVELS: tl.constexpr, DECAY: tl.constexpr, DOCS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Some channels of dq and dk [B, T, H, K] of one chunk and head, and of dg: [B, T, H, K], or for a decay per head
    what these channels add to it, [tiles, B, T, H]; what they add to k z [tiles, B, T, H]."""
    n, bh = tl.program_id(1), tl.program_id(2)
    row, h = (bh // H).to(tl.int64), bh % H
    i, d = tl.arange(0, BT), tl.program_id(0) * BK + tl.arange(0, BK)
    t = n * BT + i
    token = row * T + t
    last = row * T + tl.minimum(n * BT + BT, T) - 1
    dtype = q.dtype.element_ty
    matrix = ((row * tl.cdiv(T, BT) + n) * H + h) * (K * V)
    past, z = tl.zeros((BT, BK), tl.float32), tl.zeros((BT, BK), tl.float32)
    future, across = tl.zeros((BT, BK), tl.float32), tl.zeros((BK,), tl.float32)
    for tile in range(0, (V + BV - 1) // BV):
        e = tile * BV + tl.arange(0, BV)
        here = (token * H + h)[:, None] * V + e[None, :]
        inside_v = (t < T)[:, None] & (e < V)[None, :]
        do = tl.load(grad_o + here, mask=inside_v, other=0.0)
        dx = tl.load(y + here, mask=inside_v, other=0.0)
        put = tl.load(written + here, mask=inside_v, other=0.0)
        turned = matrix + d[None, :] * V + e[:, None]  # [BV, BK]
        inside_s = (d < K)[None, :] & (e < V)[:, None]
        S = tl.load(states + turned, mask=inside_s, other=0.0)
        dS = tl.load(grad_states + turned, mask=inside_s, other=0.0)
        across += tl.sum(S * dS, 0)
        past = tl.dot(do, S.to(dtype), past, input_precision=PRECISION)
        z = tl.dot(dx, S.to(dtype), z, input_precision=PRECISION)
        future = tl.dot(put, dS.to(dtype), future, input_precision=PRECISION)
    past *= scale
    if DOCS:
        before, final_doc = chunk_ends(docs, row, n, T, BT)
        doc = tl.load(docs + token, mask=t < T, other=0)
        past = tl.where((doc == before)[:, None], past, 0.0)
        z = tl.where((doc == before)[:, None], z, 0.0)
        future = tl.where((doc == final_doc)[:, None], future, 0.0)
        across = tl.where(before == final_doc, across, 0.0)
    inside = (t < T)[:, None] & (d < K)[None, :]
    shared = (token * (H // R) + h // R)[:, None] * K + d[None, :]
    query = tl.load(q + shared, mask=inside, other=0.0)
    key = tl.load(k + shared, mask=inside, other=0.0)
    rate = tl.load(beta + token * H + h, mask=t < T, other=0.0)[:, None]
    pair = (token * H + h)[:, None] * BT + i[None, :]
    reads = tl.load(dP + pair, mask=(t < T)[:, None], other=0.0)
    solves = tl.load(Y + pair, mask=(t < T)[:, None], other=0.0)
    diagonal = tl.sum(tl.where(i[:, None] == i[None, :], reads, 0.0).to(tl.float32), 1)[:, None]
    reads = tl.where(i[:, None] == i[None, :], 0.0, reads).to(
        dtype
    )  # no decay there: it stays out of what dg is made of
    here_k = (token * H + h)[:, None] * K + d[None, :]
    if DECAY == 2:
        total = tl.load(b + here_k, mask=inside, other=0.0)
        end = tl.load(b + (last * H + h) * K + d, mask=d < K, other=0.0)
        past *= tl.exp(total)
        z *= tl.exp(total)
        future *= tl.exp(tl.minimum(end[None, :] - total, 0.0))
        across *= tl.exp(end)
        held = tl.zeros((BT, BK), tl.float32)  # gradient of the keys as earlier halves of pairs
        for level in range(0, LEVELS):
            half = i >> (level + 1)
            late = (((i >> level) & 1) == 1)[:, None]
            border = n * BT + (half << (level + 1)) + (1 << level) - 1
            middle = tl.load(
                b + ((row * T + border) * H + h)[:, None] * K + d[None, :],
                mask=(border < T)[:, None] & (d < K)[None, :], other=0.0,
            )  # fmt: skip
            decay = tl.exp(tl.minimum(tl.where(late, total - middle, middle - total), 0.0))
            same = (half[:, None] == half[None, :]) & (t < T)[:, None]
            right = tl.where(late, 0.0, key * decay).to(dtype)
            part = tl.load(dP + pair, mask=same, other=0.0)  # again at each level: registers are scarce here
            past += tl.where(late, decay, 0.0) * tl.dot(part, right, input_precision=PRECISION)
            left = tl.where(late, query * decay, 0.0).to(dtype)
            early = tl.dot(tl.trans(part), left, input_precision=PRECISION)
            part = tl.load(Y + pair, mask=same, other=0.0)
            z += tl.where(late, decay, 0.0) * tl.dot(part, right, input_precision=PRECISION)
            left = tl.where(late, -rate * key * decay, 0.0).to(dtype)
            early = tl.dot(tl.trans(part), left, early, input_precision=PRECISION)
            held += tl.where(late, 0.0, decay) * early
    else:
        below = i[:, None] > i[None, :]  # the diagonal has no decay: it stays out of what dg is made of
        reads = tl.load(dP + pair, mask=below & (t < T)[:, None], other=0.0)
        solves = tl.load(Y + pair, mask=below & (t < T)[:, None], other=0.0)
        if DECAY == 1:
            total = tl.load(b + token * H + h, mask=t < T, other=0.0)
            end = tl.load(b + last * H + h)
            past *= tl.exp(total)[:, None]
            z *= tl.exp(total)[:, None]
            future *= tl.exp(tl.minimum(end - total, 0.0))[:, None]
            across *= tl.exp(end)
            decays = tl.exp(tl.where(below, tl.minimum(total[:, None] - total[None, :], 0.0), -float("inf")))
            reads, solves = (reads * decays).to(dtype), (solves * decays).to(dtype)
        past = tl.dot(reads, key, past, input_precision=PRECISION)
        z = tl.dot(solves, key, z, input_precision=PRECISION)
        held = tl.dot(tl.trans(reads), query, input_precision=PRECISION)
        held = tl.dot(tl.trans(solves), (-rate * key).to(dtype), held, input_precision=PRECISION)
    tl.store(dq + here_k, past + diagonal * key, mask=inside)
    tl.store(dk + here_k, future + held - rate * z + diagonal * query, mask=inside)
    part_of = ((tl.program_id(0) * B + row) * T + t) * H + h
    tl.store(kz + part_of, tl.sum(key * z, 1), mask=t < T)
    if DECAY > 0:
        reaching = query * past - key * (rate * z + held)
        leaving = key * future
        if DECAY == 2:  # sums over later and over earlier tokens as products with triangles of ones
            later = (i[:, None] <= i[None, :]).to(tl.float32)
            earlier = (i[:, None] > i[None, :]).to(tl.float32)
            dg_here = tl.dot(later, reaching, input_precision=PRECISION)
            dg_here = tl.dot(earlier, leaving, dg_here, input_precision=PRECISION) + across[None, :]
            tl.store(dg + here_k, dg_here, mask=inside)
        else:
            later = tl.where(i[:, None] >= i[None, :], tl.sum(reaching, 1)[:, None], 0.0)
            earlier = tl.where(i[:, None] < i[None, :], tl.sum(leaving, 1)[:, None], 0.0)
            tl.store(dg + part_of, tl.sum(later + earlier, 0) + tl.sum(across, 0), mask=t < T)


def backward(grad_o, grad_final, q, k, v, beta, log_decay, docs, states, scale, interval) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, beta, log_decay (empty without one) and the initial state."""
    (B, T, H, V), (G, K), s = v.shape, q.shape[2:], constants(q, v)
    N, decay, modes = triton.cdiv(T, CHUNK), kind(log_decay), {"DOCS": docs is not None}
    written, grads, y, dv = (torch.empty_like(v) for _ in range(4))
    grad_states, start = torch.empty_like(states), states.new_empty(B, H, K, V)
    with gpu.launching(q):
        f = factors(q, k, v, beta, log_decay, docs, read=True)
        options = fit(gpu.options("delta_rule_written_backward", q, WRITTEN, K=K, V=V), BK=K, BV=V)
        one = {name: s[name] for name in ("H", "V", "BT", "PRECISION")}  # without what only keys have
        delta_rule_written_backward[triton.cdiv(V, options["BV"]), N, B * H](
            f.w, f.u, f.P, grad_o, states, written, grads, scale, T, K=K, **one, **options
        )
        options = lean(fit(gpu.options("delta_rule_states_backward", q, STATES, K=K, V=V), BV=V), q)
        delta_rule_states_backward[triton.cdiv(V, options["BV"]), B * H](
            f.tail, f.read, f.w, f.b, grad_o, grad_final, docs, grads, grad_states, start, scale, T, KP=padded(K),
            DECAY=decay, FINAL=grad_final is not None, **modes, **(s | {"R": H // f.tail.shape[2]}), **options,
        )  # fmt: skip
        dP, Y, dbeta = torch.empty_like(f.P), torch.empty_like(f.P), torch.empty_like(beta)
        options = fit(gpu.options("delta_rule_pairs_backward", q, PAIRS, V=V), BV=V)
        delta_rule_pairs_backward[N, B * H](
            v, beta, f.X, written, grads, grad_o, docs, y, dv, dP, Y, dbeta, scale, T, **modes, **one, **options
        )
        options = fit(gpu.options("delta_rule_keys_backward", q, KEYS, K=K, V=V), BK=K, BV=V)
        tiles = triton.cdiv(K, options["BK"])
        dq, dk, kz = torch.empty_like(f.w), torch.empty_like(f.w), beta.new_empty(tiles, B, T, H)
        dg = beta.new_empty({0: (0,), 1: (tiles, B, T, H), 2: (B, T, H, K)}[decay])
        delta_rule_keys_backward[tiles, N, B * H](
            q, k, f.b, beta, docs, written, y, grad_o, states, grad_states, dP, Y, dq, dk, dg, kz, scale, B, T,
            LEVELS=LEVELS, DECAY=decay, **modes, **s, **options,
        )  # fmt: skip
    if G < H:
        dq, dk = (x.unflatten(2, (G, -1)).sum(3, dtype=torch.float32).to(x.dtype) for x in (dq, dk))
    return dq, dk, dv, dbeta - kz.sum(0), dg.sum(0) if decay == 1 else dg, start
