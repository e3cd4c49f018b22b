"""Gated delta rule in chunks: one unit triangular solve for all chunks, then a loop of two products a chunk.

With b the cumulative log-decay inside a chunk, S the state before it and A_xy the pair matrix x_i y_j e^{b_i - b_j}:
(I + strict(beta A_kk)) [U | W] = beta [v | k e^b];  V = U - W S  (what each token really writes)
o = (q e^b) S + A_qk V;  S <- e^{b_C} S + (k e^{b_C - b})^T V.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.chunking import Documents, causal, scalar_decays, spans, vector_decayed_scores, wide

SHORT = 4  # up to so many tokens are written one by one, which is as exact and needs no pair matrices


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    doc_ids: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """See `zoo.kernels.delta_rule.delta_rule`."""
    (B, T, H, Dv), (G, Dk), dtype = v.shape, k.shape[2:], wide(v.dtype)
    out_dtype = v.dtype
    q, k, v, beta = q.to(dtype) * scale, k.to(dtype), v.to(dtype), beta.to(dtype)
    g = None if log_decay is None else log_decay.to(dtype)
    S = v.new_zeros(B, H, Dk, Dv) if initial_state is None else initial_state.to(dtype)
    per_channel = g is not None and g.ndim == 4
    if G < H and (per_channel or T <= SHORT):
        q, k = (x.repeat_interleave(H // G, 2) for x in (q, k))
    if T <= SHORT:
        o, S = _steps(q, k, v, beta, g, S, doc_ids)
        return o.to(out_dtype), S
    outputs = []
    for span in spans(T, chunk_size, binary=per_channel):
        docs = None if doc_ids is None else span.documents(doc_ids)
        g_part = None if g is None else span.take(g)
        o, S = _chunks(span.take(q), span.take(k), span.take(v), span.take(beta), g_part, S, docs, span.chunk)
        outputs.append(o[:, : -span.pad] if span.pad else o)
    o = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
    return o.to(out_dtype), S


def _steps(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, S: Tensor, doc_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Token by token: both reads of a token are one product with its decayed state."""
    decay = None if g is None else (g if g.ndim == 4 else g[..., None]).exp()[..., None]
    both = torch.stack([k, q], 3)  # [B, T, H, 2, Dk]
    overlap = (q * k).sum(-1, keepdim=True)
    outputs = []
    for t in range(v.shape[1]):  # at most SHORT tokens
        if doc_ids is not None and t > 0:
            S = S * (doc_ids[:, t] == doc_ids[:, t - 1])[:, None, None, None]
        S = S if decay is None else S * decay[:, t]
        held, seen = (both[:, t] @ S).unbind(2)
        write = beta[:, t, :, None] * (v[:, t] - held)
        outputs.append(seen + overlap[:, t] * write)
        S = torch.addcmul(S, k[:, t, ..., None], write[..., None, :])
    return torch.stack(outputs, 1), S


def _chunks(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, S: Tensor, docs: Documents | None, C: int
) -> tuple[Tensor, Tensor]:
    (B, T, H, Dv), (G, Dk) = v.shape, k.shape[2:]
    N, R = T // C, H // G
    q, k, v, beta = (x.unflatten(1, (N, C)).transpose(2, 3) for x in (q, k, v, beta[..., None]))  # [B, N, H, C, .]
    allowed = causal(C, v.device)
    if docs is not None:
        allowed = allowed & docs.pair[:, :, None]
    one = v.new_ones(1, 1, 1, 1, 1)
    if g is not None and g.ndim == 4:
        total = g.unflatten(1, (N, C)).transpose(2, 3).cumsum(-2)  # [B, N, H, C, Dk]
        qk, kk = vector_decayed_scores((q, k), k, total)
        if docs is not None:
            qk, kk = qk * docs.pair[:, :, None], kk * docs.pair[:, :, None]
        keep = total[..., -1, :, None].exp()
        read, write = total.exp(), (total[..., -1:, :] - total).exp()
    else:
        q, k = q.contiguous(), k.contiguous()
        scores = [x @ k.transpose(-1, -2) for x in (q, k)]  # once for all heads that share q and k
        if R > 1:
            q, k, *scores = (x.repeat_interleave(R, 2) for x in (q, k, *scores))
        if g is None:
            qk, kk = (s.masked_fill(~allowed, 0) for s in scores)
            read = write = keep = one
        else:
            total = g.unflatten(1, (N, C)).transpose(2, 3).cumsum(-1)  # [B, N, H, C]
            decays = scalar_decays(total, allowed)
            qk, kk = (s * decays for s in scores)
            keep = total[..., -1, None, None].exp()
            read, write = total.exp()[..., None], (total[..., -1:] - total).exp()[..., None]
    if docs is not None:
        read, write = read * docs.query[:, :, None, :, None], write * docs.key[:, :, None, :, None]
        keep = keep * docs.keep[:, :, None, None, None]
    right = torch.cat([beta * v, (beta * read) * k], -1)
    solved = torch.linalg.solve_triangular(beta * kk, right, upper=False, unitriangular=True)

    flat = solved.transpose(1, 2).flatten(0, 1)  # [B * H, N, C, Dv + Dk]
    kept = keep.expand(B, N, H, -1, 1).transpose(1, 2).flatten(0, 1)
    written = (k * write).transpose(1, 2).flatten(0, 1).transpose(-1, -2)
    S = S.flatten(0, 1)
    states, values = [], []
    for x, d, kt in zip(flat.unbind(1), kept.unbind(1), written.unbind(1)):
        u, w = x.split((Dv, Dk), -1)
        states.append(S)
        values.append(torch.baddbmm(u, w, S, alpha=-1))
        S = torch.baddbmm(S * d, kt, values[-1])
    before, values = (torch.stack(x, 1).unflatten(0, (B, H)).transpose(1, 2) for x in (states, values))
    o = (q * read) @ before + qk @ values
    return o.transpose(2, 3).flatten(1, 2), S.unflatten(0, (B, H))
