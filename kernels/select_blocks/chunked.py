"""Scores and choices of some queries at a time, so that the table of all scores is never whole."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.block_scores import block_scores
from zoo.kernels.select import select

SCORES_AT_ONCE = 1 << 24


def select_blocks(
    q: Tensor,
    keys: Tensor,
    k: int,
    q_index: Tensor,
    k_index: Tensor,
    q_doc_ids: Tensor | None,
    k_doc_ids: Tensor | None,
    scale: float,
    forced: Tensor | None,
    visible: Tensor | None,
) -> Tensor:
    """See `zoo.kernels.select_blocks.select_blocks`; returns idx int32 [B, Hq, T, k]."""
    q, keys = q.detach(), keys.detach()
    B, T, Hq, _ = q.shape
    shape = (B, Hq, T, keys.shape[1])
    forced, visible = (None if x is None else x.expand(shape) for x in (forced, visible))
    step = max(1, SCORES_AT_ONCE // max(B * Hq * shape[3], 1))
    chosen = []
    for a in range(0, max(T, 1), step):
        part = slice(a, a + step)
        ids = {} if q_doc_ids is None else {"q_doc_ids": q_doc_ids[:, part], "k_doc_ids": k_doc_ids}
        scores = block_scores(q[:, part], keys, q_index=q_index[:, part], k_index=k_index, scale=scale, **ids)
        rules = {n: x if x is None else x[:, :, part] for n, x in (("forced", forced), ("visible", visible))}
        chosen.append(select(scores, k, **rules).idx)
    return torch.cat(chosen, 2)
