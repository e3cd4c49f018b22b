"""Block scores by one matrix product per key head."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.precision import no_autocast


def visible_blocks(q_index: Tensor, k_index: Tensor, q_doc_ids: Tensor | None, k_doc_ids: Tensor | None) -> Tensor:
    """Which blocks end before which query, in its document: bool [B, T, N]."""
    last = k_index[:, None]
    visible = (last >= 0) & (last < q_index[..., None])
    return visible if q_doc_ids is None else visible & (k_doc_ids[:, None] == q_doc_ids[..., None])


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
    B, T, Hq, D = q.shape
    N, Hkv = keys.shape[1:3]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    grouped = q.to(dtype).transpose(1, 2).reshape(B, Hkv, Hq // Hkv * T, D)
    with no_autocast(q.device):
        scores = (grouped @ keys.to(dtype).permute(0, 2, 3, 1)).reshape(B, Hq, T, N) * scale
    visible = visible_blocks(q_index, k_index, q_doc_ids, k_doc_ids)
    return torch.where(visible[:, None], scores, float("-inf"))
