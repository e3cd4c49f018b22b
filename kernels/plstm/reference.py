"""Definition of pLSTM in one dimension: a token loop."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.chunking import wide


def plstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    source: Tensor,
    transition: Tensor,
    mark: Tensor,
    direct: Tensor,
    scale: float,
    initial_state: Tensor | None,
    doc_ids: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """o_t = scale * (M_t C_{t-1} q_t + D_t v_t (q_t . k_t));  C_t = T_t C_{t-1} + (S_t v_t) k_t^T; C is zero before a
    document."""
    (B, T, H, Dk), (J, Dv), dtype = q.shape, (transition.shape[-1], v.shape[-1]), wide(v.dtype)
    C = v.new_zeros(B, H, J, Dk, Dv, dtype=dtype) if initial_state is None else initial_state.to(dtype)
    same = torch.ones(B, T, device=v.device, dtype=dtype)
    if doc_ids is not None:
        same[:, 1:] = (doc_ids[:, 1:] == doc_ids[:, :-1]).to(dtype)
    o = []
    tokens = (x.to(dtype).unbind(1) for x in (q, k, v, source, transition, mark, direct, same))
    for q_t, k_t, v_t, S_t, T_t, M_t, D_t, same_t in zip(*tokens):
        C = C * same_t[:, None, None, None, None]
        past = torch.einsum("bhoj,bhjde,bhd->bhoe", M_t, C, q_t)
        o.append(scale * (past + torch.einsum("bhov,bhve,bhd,bhd->bhoe", D_t, v_t, q_t, k_t)))
        C = torch.einsum("bhji,bhide->bhjde", T_t, C) + torch.einsum("bhjv,bhve,bhd->bhjde", S_t, v_t, k_t)
    return torch.stack(o, 1).to(v.dtype), C
