"""Definition of the gated delta rule: a token loop."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.chunking import wide


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
    """S' = exp(g_t) * S_{t-1};  S_t = S' + beta_t k_t (v_t - S'^T k_t)^T;  o_t = scale * S_t^T q_t."""
    (B, T, H, Dv), Dk, dtype = v.shape, k.shape[-1], wide(v.dtype)
    q, k = (x.to(dtype).repeat_interleave(H // x.shape[2], 2) for x in (q, k))
    S = v.new_zeros(B, H, Dk, Dv, dtype=dtype) if initial_state is None else initial_state.to(dtype)
    g = torch.zeros_like(beta) if log_decay is None else log_decay
    decay = (g[..., None] if g.ndim == 3 else g).to(dtype).exp()[..., None]  # [B, T, H, Dk or 1, 1]
    same = torch.ones(B, T, device=v.device, dtype=dtype)
    if doc_ids is not None:
        same[:, 1:] = (doc_ids[:, 1:] == doc_ids[:, :-1]).to(dtype)
    o = []
    steps = (q, k, v.to(dtype), beta.to(dtype), decay, same)
    for q_t, k_t, v_t, beta_t, decay_t, same_t in zip(*(x.unbind(1) for x in steps)):
        S = decay_t * (S * same_t[:, None, None, None])
        error = v_t - (S * k_t[..., None]).sum(-2)
        S = S + k_t[..., None] * (beta_t[..., None] * error)[..., None, :]
        o.append(scale * (S * q_t[..., None]).sum(-2))
    return torch.stack(o, 1).to(v.dtype), S
