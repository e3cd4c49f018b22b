"""Decayed linear attention in chunks: matrix products inside and between chunks, a loop over chunk states.

With b the cumulative log-decay inside a chunk and S the state before it:
o = (q k^T * exp(b_i - b_j)) v + (q * e^b) S;  S <- e^{b_C} * S + (k * e^{b_C - b})^T v.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.chunking import Documents, carry, causal, scalar_decays, spans, vector_decayed_scores, wide


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    doc_ids: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """See `zoo.kernels.linear_attention.linear_attention`."""
    (B, T, H, Dv), (G, Dk), dtype = v.shape, k.shape[2:], wide(v.dtype)
    out_dtype = v.dtype
    q, k, v = q.to(dtype) * scale, k.to(dtype), v.to(dtype)
    g = None if log_decay is None else log_decay.to(dtype)
    S = v.new_zeros(B, H, Dk, Dv) if initial_state is None else initial_state.to(dtype)
    if T == 1:
        o, S = _step(q, k, v, g, S)
        return o.to(out_dtype), S
    per_channel = g is not None and g.ndim == 4
    if per_channel and G < H:
        q, k = (x.repeat_interleave(H // G, 2) for x in (q, k))
    outputs = []
    for span in spans(T, chunk_size, binary=per_channel):
        docs = None if doc_ids is None else span.documents(doc_ids)
        g_part = g if g is None or g.ndim == 1 else span.take(g)
        q_part, k_part, v_part = (span.take(x) for x in (q, k, v))
        if g_part is None or g_part.ndim < 4:
            o, S = _scalar(q_part, k_part, v_part, g_part, S, docs, span.chunk)
        else:
            o, S = _vector(q_part, k_part, v_part, g_part, S, docs, span.chunk)
        outputs.append(o[:, : -span.pad] if span.pad else o)
    o = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
    return o.to(out_dtype), S


def _step(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, S: Tensor) -> tuple[Tensor, Tensor]:
    """One token: no chunk to form."""
    B, _, H, _ = v.shape
    repeats = H // k.shape[2]
    q, k = (x[:, 0].unsqueeze(2).expand(B, -1, repeats, -1).reshape(B, H, -1) for x in (q, k))
    update = k[..., None] * v[:, 0, :, None, :]
    if g is None:
        S = S + update
    else:
        g = g[None, :, None, None] if g.ndim == 1 else g[:, 0, :, None, None] if g.ndim == 3 else g[:, 0, ..., None]
        S = torch.addcmul(update, S, g.exp())
    return (q[:, :, None] @ S).transpose(1, 2), S


def _scalar(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, S: Tensor, docs: Documents | None, C: int
) -> tuple[Tensor, Tensor]:
    """No decay or one per head. Heads that share q and k are folded: their scores are formed once, and the
    products with the state see them as more columns."""
    (B, T, H, Dv), (G, Dk) = v.shape, k.shape[2:]
    R, N = H // G, T // C
    q, k = (x.reshape(B, N, C, G, Dk).transpose(2, 3) for x in (q, k))  # [B, N, G, C, Dk]
    v = v.reshape(B, N, C, G, R, Dv)
    scores = q @ k.transpose(-1, -2)  # [B, N, G, C, C]
    allowed = causal(C, v.device)
    if docs is not None:
        allowed = allowed & docs.pair[:, :, None]
    if g is None:
        columns = v.transpose(2, 3).reshape(B, N, G, C, R * Dv)
        inside = (scores.masked_fill(~allowed, 0) @ columns).unflatten(-1, (R, Dv))
        read = write = keep = None
    else:
        if g.ndim == 1:
            total = g[:, None] * torch.arange(1, C + 1, device=g.device)
            total = total.reshape(1, 1, G, R, C)
        else:
            total = g.reshape(B, N, C, G, R).movedim(2, -1).cumsum(-1)  # [B, N, G, R, C]
        weights = scores.unsqueeze(3) * scalar_decays(total, allowed if docs is None else allowed.unsqueeze(3))
        inside = (weights @ v.permute(0, 1, 3, 4, 2, 5)).transpose(3, 4)
        read = total.exp().transpose(3, 4)  # [B or 1, N or 1, G, C, R]
        write = (total[..., -1:] - total).exp().transpose(3, 4)
        keep = total[..., -1].exp()  # [.., G, R]
    if docs is not None:
        masks = (docs.query[:, :, None, :, None], docs.key[:, :, None, :, None], docs.keep[:, :, None, None])
        read, write, keep = (m.to(v.dtype) if f is None else f * m for f, m in zip((read, write, keep), masks))
    v = v.transpose(2, 3)  # [B, N, G, C, R, Dv]
    v = v if write is None else v * write[..., None]
    update = k.transpose(-1, -2) @ v.reshape(B, N, G, C, R * Dv)
    if keep is not None:
        keep = keep[..., None].expand(B, N, -1, R, Dv).reshape(B, N, -1, 1, R * Dv)
    S = S.reshape(B, G, R, Dk, Dv).transpose(2, 3).reshape(B, G, Dk, R * Dv)
    states, S = carry(update, keep, S)
    past = (q @ states).unflatten(-1, (R, Dv))
    o = inside + (past if read is None else past * read[..., None])
    S = S.unflatten(-1, (R, Dv)).transpose(2, 3).reshape(B, H, Dk, Dv)
    return o.transpose(2, 3).reshape(B, T, H, Dv), S


def _vector(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, S: Tensor, docs: Documents | None, C: int
) -> tuple[Tensor, Tensor]:
    """A decay for every key channel; C is a power of two."""
    q, k, v, g = (x.unflatten(1, (-1, C)).transpose(2, 3) for x in (q, k, v, g))  # [B, N, H, C, D]
    total = g.cumsum(-2)
    (weights,) = vector_decayed_scores((q,), k, total)
    read, write, keep = total.exp(), (total[..., -1:, :] - total).exp(), total[..., -1, :].exp()
    if docs is not None:
        weights = weights * docs.pair[:, :, None]
        read, write = read * docs.query[:, :, None, :, None], write * docs.key[:, :, None, :, None]
        keep = keep * docs.keep[:, :, None, None]
    states, S = carry((k * write).transpose(-1, -2) @ v, keep[..., None], S)
    o = weights @ v + (q * read) @ states
    return o.transpose(2, 3).flatten(1, 2), S
