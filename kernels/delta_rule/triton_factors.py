"""What the chunked delta rule in Triton can have of each chunk without the state before it, for forward and backward:

    sums      b = cumulative log-decays of each chunk
    pairs     A = strict lower triangle of beta_i k_i k_j e^{b_i - b_j};  P = lower triangle of q_i k_j e^{b_i - b_j}
    solve     X = (I + A)^-1
    factors   w = X (beta e^b k), u = X (beta v)

A decay per channel is split as in `zoo.kernels.chunking.vector_decayed_scores`: pairs whose halves part at a border of
1, 2, .. 32 tokens take their decay from that border, so that each level is one matrix product and one exponential of
a number <= 0 for every token and channel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels import gpu
from zoo.kernels.linear_attention.triton import CHUNK, LEVELS, chunk_ends, fit, kind, shapes, sums

BLOCK = 16  # diagonal blocks of a chunk that are inverted row by row

PAIRS = [{"BK": 32, "num_warps": 4, "num_stages": 1}, {"BK": 64, "num_warps": 8, "num_stages": 1}]
SOLVE = [{"num_warps": 4, "num_stages": 1}]
FACTORS = [{"BK": 32, "BV": 64, "num_warps": 4, "num_stages": 2}]


@triton.jit
def delta_rule_pairs(
    q, k, b, beta, docs, A, P, T, H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, BT: tl.constexpr,
    BK: tl.constexpr, LEVELS: tl.constexpr, DECAY: tl.constexpr, DOCS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A and P [B, T, H, BT] of one chunk and head."""
    n, bh = tl.program_id(0), tl.program_id(1)
    row, h = (bh // H).to(tl.int64), bh % H
    i = tl.arange(0, BT)
    t = n * BT + i
    token = row * T + t
    dtype = q.dtype.element_ty
    qk, kk, diagonal = tl.zeros((BT, BT), tl.float32), tl.zeros((BT, BT), tl.float32), tl.zeros((BT,), tl.float32)
    for tile in range(0, (K + BK - 1) // BK):
        d = tile * BK + tl.arange(0, BK)
        inside = (t < T)[:, None] & (d < K)[None, :]
        shared = (token * (H // R) + h // R)[:, None] * K + d[None, :]
        query = tl.load(q + shared, mask=inside, other=0.0)
        key = tl.load(k + shared, mask=inside, other=0.0)
        if DECAY == 2:
            total = tl.load(b + (token * H + h)[:, None] * K + d[None, :], mask=inside, other=0.0)
            diagonal += tl.sum(query.to(tl.float32) * key.to(tl.float32), 1)
            for level in range(0, LEVELS):
                pair = i >> (level + 1)
                late = (((i >> level) & 1) == 1)[:, None]
                border = n * BT + (pair << (level + 1)) + (1 << level) - 1
                middle = tl.load(
                    b + ((row * T + border) * H + h)[:, None] * K + d[None, :],
                    mask=(border < T)[:, None] & (d < K)[None, :], other=0.0,
                )  # fmt: skip
                decay = tl.exp(tl.minimum(tl.where(late, total - middle, middle - total), 0.0))
                decayed = (key * decay).to(dtype)
                right = tl.trans(tl.where(late, 0.0, decayed).to(dtype))
                same = pair[:, None] == pair[None, :]
                part = tl.dot(tl.where(late, query * decay, 0.0).to(dtype), right, input_precision=PRECISION)
                qk += tl.where(same, part, 0.0)
                part = tl.dot(tl.where(late, decayed, 0.0).to(dtype), right, input_precision=PRECISION)
                kk += tl.where(same, part, 0.0)
        else:
            qk = tl.dot(query, tl.trans(key), qk, input_precision=PRECISION)
            kk = tl.dot(key, tl.trans(key), kk, input_precision=PRECISION)
    allowed = i[:, None] >= i[None, :]
    if DOCS:
        doc = tl.load(docs + token, mask=t < T, other=0)
        allowed = allowed & (doc[:, None] == doc[None, :])
    if DECAY == 2:
        qk = tl.where(i[:, None] == i[None, :], diagonal[:, None], qk)
    if DECAY == 1:
        total = tl.load(b + token * H + h, mask=t < T, other=0.0)
        decays = tl.exp(tl.where(allowed, tl.minimum(total[:, None] - total[None, :], 0.0), -float("inf")))
        qk *= decays
        kk *= decays
    rate = tl.load(beta + token * H + h, mask=t < T, other=0.0)
    here = (token * H + h)[:, None] * BT + i[None, :]
    tl.store(P + here, tl.where(allowed, qk, 0.0), mask=(t < T)[:, None])
    kk = tl.where(allowed & (i[:, None] > i[None, :]), rate[:, None] * kk, 0.0)
    tl.store(A + here, kk, mask=(t < T)[:, None])


@triton.jit
def delta_rule_solve(A, X, T, H: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr, PRECISION: tl.constexpr):
    """X = (I + A)^-1 [B, T, H, BT] of one chunk and head by forward substitution: the diagonal blocks of BS rows row by
    row, all of them together, then block row by block row."""
    NB: tl.constexpr = BT // BS
    n, bh = tl.program_id(0), tl.program_id(1)
    row, h = (bh // H).to(tl.int64), bh % H
    block, r, c = tl.arange(0, NB)[:, None, None], tl.arange(0, BS)[None, :, None], tl.arange(0, BS)[None, None, :]
    t = n * BT + block * BS + r
    at = ((row * T + t) * H + h) * BT + block * BS + c
    inverse = -tl.load(A + at, mask=(t < T) & (c < BS), other=0.0)
    for line in range(1, BS):
        x = tl.sum(tl.where(r == line, inverse, 0.0), 1)
        x += tl.sum(x[:, :, None] * inverse, 1)
        inverse = tl.where(r == line, x[:, None, :], inverse)
    inverse = tl.where(r == c, 1.0, inverse)
    i, s = tl.arange(0, BT), tl.arange(0, BS)
    rows = n * BT + i
    known = tl.zeros((BT, BT), tl.float32)  # A's columns times X's rows, of the blocks so far
    for m in range(0, NB):
        column = tl.load(
            A + ((row * T + rows) * H + h)[:, None] * BT + (m * BS + s)[None, :], mask=(rows < T)[:, None], other=0.0
        )
        corner = tl.sum(tl.where(block == m, inverse, 0.0), 0)
        right = (i[None, :] == (m * BS + s)[:, None]).to(tl.float32)
        right -= tl.sum(tl.where(block == m, tl.reshape(known, (NB, BS, BT)), 0.0), 0)
        x = tl.dot(corner, right, input_precision=PRECISION)
        known = tl.dot(column, x, known, input_precision=PRECISION)
        t_block = n * BT + m * BS + s
        here = ((row * T + t_block) * H + h)[:, None] * BT + i[None, :]
        tl.store(X + here, x, mask=(t_block < T)[:, None])


@triton.jit
def delta_rule_factors(
    q, k, v, b, beta, X, docs, w, u, tail, read, T, H: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DECAY: tl.constexpr, DOCS: tl.constexpr,
    READ: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """w [B, T, H, K] and u [B, T, H, V] of one chunk and head. For a decay per channel also tail = k e^{b_C - b} and,
    for backward (READ), read = q e^b, both [B, T, H, K]: what is sequential should have little to do."""
    n, bh = tl.program_id(0), tl.program_id(1)
    row, h = (bh // H).to(tl.int64), bh % H
    i = tl.arange(0, BT)
    t = n * BT + i
    token = row * T + t
    last = row * T + tl.minimum(n * BT + BT, T) - 1
    dtype = q.dtype.element_ty
    x = tl.load(X + (token * H + h)[:, None] * BT + i[None, :], mask=(t < T)[:, None], other=0.0)
    rate = tl.load(beta + token * H + h, mask=t < T, other=0.0)
    seen = rate
    if DECAY == 1:
        seen *= tl.exp(tl.load(b + token * H + h, mask=t < T, other=0.0))
    if DOCS:
        before, _ = chunk_ends(docs, row, n, T, BT)
        seen = tl.where(tl.load(docs + token, mask=t < T, other=0) == before, seen, 0.0)
    for tile in range(0, (K + BK - 1) // BK):
        d = tile * BK + tl.arange(0, BK)
        inside = (t < T)[:, None] & (d < K)[None, :]
        shared = (token * (H // R) + h // R)[:, None] * K + d[None, :]
        here = (token * H + h)[:, None] * K + d[None, :]
        key = tl.load(k + shared, mask=inside, other=0.0).to(tl.float32)
        if DECAY == 2:
            total = tl.load(b + here, mask=inside, other=0.0)
            end = tl.load(b + (last * H + h) * K + d, mask=d < K, other=0.0)
            tl.store(tail + here, key * tl.exp(tl.minimum(end[None, :] - total, 0.0)), mask=inside)
            decay = tl.exp(total)
            if READ:
                tl.store(read + here, tl.load(q + shared, mask=inside, other=0.0) * decay, mask=inside)
            key *= decay
        part = tl.dot(x, (key * seen[:, None]).to(dtype), input_precision=PRECISION)
        tl.store(w + here, part, mask=inside)
    for tile in range(0, (V + BV - 1) // BV):
        e = tile * BV + tl.arange(0, BV)
        inside = (t < T)[:, None] & (e < V)[None, :]
        here = (token * H + h)[:, None] * V + e[None, :]
        value = tl.load(v + here, mask=inside, other=0.0)
        tl.store(u + here, tl.dot(x, (value * rate[:, None]).to(dtype), input_precision=PRECISION), mask=inside)


def constants(q: Tensor, v: Tensor) -> dict[str, int | str]:
    """What the kernels are compiled for. Products of float32 are three of TF32, which is as exact and, unlike one by
    scalar instructions, fits the registers; half precision is not concerned."""
    return shapes(q, v) | {"PRECISION": "tf32x3"}


class Factors(NamedTuple):
    """What forward and backward share; tail and read as they stand in `delta_rule_factors`, or k and q."""

    b: Tensor | None
    P: Tensor
    X: Tensor
    w: Tensor
    u: Tensor
    tail: Tensor
    read: Tensor


def factors(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, docs: Tensor | None, read: bool
) -> Factors:
    """All that can be had of each chunk without the state before it."""
    (B, T, H, V), K, s = v.shape, q.shape[3], constants(q, v)
    keys_only = {name: n for name, n in s.items() if name != "V"}
    modes = {"DECAY": kind(g), "DOCS": docs is not None}
    grid = (triton.cdiv(T, CHUNK), B * H)
    A = beta.new_empty(B, T, H, CHUNK)
    P, X, w, u = q.new_empty(A.shape), q.new_empty(A.shape), q.new_empty(B, T, H, K), torch.empty_like(v)
    b = sums(g)
    options = fit(gpu.options("delta_rule_pairs", q, PAIRS, K=K), BK=K)
    delta_rule_pairs[grid](q, k, b, beta, docs, A, P, T, LEVELS=LEVELS, **modes, **keys_only, **options)
    solve = {"H": H, "BT": CHUNK, "BS": BLOCK, "PRECISION": s["PRECISION"]}
    delta_rule_solve[grid](A, X, T, **solve, **gpu.options("delta_rule_solve", q, SOLVE))
    channels = kind(g) == 2
    tail, looking = torch.empty_like(w) if channels else k, torch.empty_like(w) if channels and read else q
    options = fit(gpu.options("delta_rule_factors", q, FACTORS, K=K, V=V), BK=K, BV=V)
    delta_rule_factors[grid](q, k, v, b, beta, X, docs, w, u, tail, looking, T, READ=read, **modes, **s, **options)
    return Factors(b, P, X, w, u, tail, looking)
