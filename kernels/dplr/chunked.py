"""Diagonal plus low-rank recurrence in chunks: one unit triangular solve for all chunks, then a loop of two products.

With b the cumulative log-decay inside a chunk, S the state before it, A_xy the pair matrix x_i y_j e^{b_i - b_j} of
i >= j, and A'_ay = a_i y_j e^{b_{i-1} - b_j} of i > j, because a reads the state before its token, undecayed:
(I - A'_ab) [U | W] = [A'_ak v | a e^{b_{i-1}}];  Z = U + W S  (what each token really reads under a)
o = (q e^b) S + A_qk v + A_qb Z;  S <- e^{b_C} S + (k e^{b_C - b})^T v + (b e^{b_C - b})^T Z.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.kernels.chunking import Documents, spans, vector_decayed_scores, wide

SHORT = 4  # up to so many tokens are written one by one, which is as exact and needs no pair matrices


def dplr(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor,
    scale: float,
    initial_state: Tensor | None,
    doc_ids: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """See `zoo.kernels.dplr.dplr`."""
    (B, T, H, Dv), Dk, dtype, out_dtype = v.shape, k.shape[3], wide(v.dtype), v.dtype
    q, k, v, a, b, g = (x.to(dtype) for x in (q, k, v, a, b, log_decay))
    q = q * scale
    S = v.new_zeros(B, H, Dk, Dv) if initial_state is None else initial_state.to(dtype)
    if T <= SHORT:
        o, S = _steps(q, k, v, a, b, g, S, doc_ids)
        return o.to(out_dtype), S
    outputs = []
    for span in spans(T, chunk_size, binary=True):
        docs = None if doc_ids is None else span.documents(doc_ids)
        o, S = _chunks(*(span.take(x) for x in (q, k, v, a, b, g)), S=S, docs=docs, C=span.chunk)
        outputs.append(o[:, : -span.pad] if span.pad else o)
    o = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
    return o.to(out_dtype), S


def _steps(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g: Tensor, S: Tensor, doc_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Token by token: both reads of a token are one product with the state before it."""
    decay = g.exp()
    both = torch.stack([a, q * decay], 3)  # [B, T, H, 2, Dk]
    qb, qk = ((q * x).sum(-1, keepdim=True) for x in (b, k))
    outputs = []
    for t in range(v.shape[1]):  # at most SHORT tokens
        if doc_ids is not None and t > 0:
            S = S * (doc_ids[:, t] == doc_ids[:, t - 1])[:, None, None, None]
        held, seen = (both[:, t] @ S).unbind(2)
        outputs.append(seen + qb[:, t] * held + qk[:, t] * v[:, t])
        S = torch.addcmul(S * decay[:, t, ..., None], b[:, t, ..., None], held[..., None, :])
        S = torch.addcmul(S, k[:, t, ..., None], v[:, t, ..., None, :])
    return torch.stack(outputs, 1), S


def _chunks(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g: Tensor, S: Tensor, docs: Documents | None, C: int
) -> tuple[Tensor, Tensor]:
    (B, T, H, Dv), Dk = v.shape, k.shape[3]
    q, k, v, a, b, g = (x.unflatten(1, (T // C, C)).transpose(2, 3) for x in (q, k, v, a, b, g))  # [B, N, H, C, .]
    total = g.cumsum(-2)
    before = F.pad(total[..., :-1, :], (0, 0, 1, 0))  # b_{i-1}
    # a of the next token with the decay of this one is a pair matrix like q's, one row too high
    rows = q, F.pad(a[..., 1:, :], (0, 0, 0, 1))
    keys = torch.stack([b, k])
    of_q, of_a = vector_decayed_scores(rows, keys, total)  # [2, B, N, H, C, C]
    of_a = F.pad(of_a[..., :-1, :], (0, 0, 1, 0))
    read_q, read_a, write, keep = total.exp(), before.exp(), (total[..., -1:, :] - total).exp(), total[..., -1, :].exp()
    if docs is not None:
        pair, query = docs.pair[:, :, None], docs.query[:, :, None, :, None]
        of_q, of_a, read_q, read_a = of_q * pair, of_a * pair, read_q * query, read_a * query
        write, keep = write * docs.key[:, :, None, :, None], keep * docs.keep[:, :, None, None]
    (qb, qk), (ab, ak) = of_q.unbind(0), of_a.unbind(0)
    right = torch.cat([ak @ v, a * read_a], -1)
    solved = torch.linalg.solve_triangular(-ab, right, upper=False, unitriangular=True)
    write_b, write_k = (keys * write).transpose(-1, -2).unbind(0)
    update = write_k @ v

    # the loop, over [B * H] matrices
    steps = (x.transpose(1, 2).flatten(0, 1).unbind(1) for x in (solved, keep[..., None], write_b, update))
    S = S.flatten(0, 1)
    states, held = [], []
    for x, decay, key, new in zip(*steps):
        u, w = x.split((Dv, Dk), -1)
        states.append(S)
        held.append(torch.baddbmm(u, w, S))
        S = torch.baddbmm(torch.addcmul(new, S, decay), key, held[-1])
    starts, held = (torch.stack(x, 1).unflatten(0, (B, H)).transpose(1, 2) for x in (states, held))
    o = (q * read_q) @ starts + qk @ v + qb @ held
    return o.transpose(2, 3).flatten(1, 2), S.unflatten(0, (B, H))
