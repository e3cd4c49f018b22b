"""Definition of decayed linear attention: a token loop."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.chunking import wide


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
    """S_t = exp(g_t) * S_{t-1} + k_t v_t^T;  o_t = scale * S_t^T q_t;  S is zero before a document."""
    (B, T, H, Dv), Dk, dtype = v.shape, k.shape[-1], wide(v.dtype)
    q, k = (x.to(dtype).repeat_interleave(H // x.shape[2], 2) for x in (q, k))
    S = v.new_zeros(B, H, Dk, Dv, dtype=dtype) if initial_state is None else initial_state.to(dtype)
    g = torch.zeros(H, device=v.device, dtype=dtype) if log_decay is None else log_decay.to(dtype)
    g = g.expand(B, T, H) if g.ndim == 1 else g
    decay = (g[..., None] if g.ndim == 3 else g).exp()[..., None]  # [B, T, H, Dk or 1, 1]
    same = torch.ones(B, T, device=v.device, dtype=dtype)
    if doc_ids is not None:
        same[:, 1:] = (doc_ids[:, 1:] == doc_ids[:, :-1]).to(dtype)
    o = []
    tokens = zip(q.unbind(1), k.unbind(1), v.to(dtype).unbind(1), decay.unbind(1), same.unbind(1))
    for q_t, k_t, v_t, decay_t, same_t in tokens:
        S = decay_t * (S * same_t[:, None, None, None]) + k_t[..., None] * v_t[..., None, :]
        o.append(scale * (S * q_t[..., None]).sum(-2))
    return torch.stack(o, 1).to(v.dtype), S
