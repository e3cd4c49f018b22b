"""Definition of block scores: a loop over queries."""

from __future__ import annotations

import torch
from torch import Tensor


def block_scores(
    q: Tensor,
    keys: Tensor,
    q_index: Tensor,
    k_index: Tensor,
    q_doc_ids: Tensor | None,
    k_doc_ids: Tensor | None,
    scale: float,
) -> Tensor:
    """See `zoo.kernels.block_scores.block_scores`."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    keys = keys.to(dtype).repeat_interleave(q.shape[2] // keys.shape[2], dim=2)
    rows = []
    for t in range(q.shape[1]):
        score = scale * (q[:, t, None].to(dtype) * keys).sum(-1)  # [B, N, Hq]
        visible = (k_index >= 0) & (k_index < q_index[:, t, None])
        if q_doc_ids is not None:
            visible = visible & (k_doc_ids == q_doc_ids[:, t, None])
        rows.append(torch.where(visible[..., None], score, float("-inf")).transpose(1, 2))
    return torch.stack(rows, 2)
