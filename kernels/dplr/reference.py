"""Definition of the diagonal plus low-rank recurrence: a token loop."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.chunking import wide


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
    """S_t = exp(g_t) * S_{t-1} + b_t (S_{t-1}^T a_t)^T + k_t v_t^T;  o_t = scale * S_t^T q_t."""
    (B, T, H, Dv), Dk, dtype = v.shape, k.shape[-1], wide(v.dtype)
    S = v.new_zeros(B, H, Dk, Dv, dtype=dtype) if initial_state is None else initial_state.to(dtype)
    same = torch.ones(B, T, device=v.device, dtype=dtype)
    if doc_ids is not None:
        same[:, 1:] = (doc_ids[:, 1:] == doc_ids[:, :-1]).to(dtype)
    o = []
    steps = (*(x.to(dtype) for x in (q, k, v, a, b, log_decay)), same)
    for q_t, k_t, v_t, a_t, b_t, g_t, same_t in zip(*(x.unbind(1) for x in steps)):
        S = S * same_t[:, None, None, None]
        held = (S * a_t[..., None]).sum(-2)  # what the state before the token, undecayed, holds under a
        S = g_t.exp()[..., None] * S + b_t[..., None] * held[..., None, :] + k_t[..., None] * v_t[..., None, :]
        o.append(scale * (S * q_t[..., None]).sum(-2))
    return torch.stack(o, 1).to(v.dtype), S
