"""Definition: all scores, then the choice."""

from __future__ import annotations

from torch import Tensor

from zoo.kernels.block_scores import reference as scoring
from zoo.kernels.select import reference as choosing


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
    scores = scoring.block_scores(q, keys, q_index, k_index, q_doc_ids, k_doc_ids, scale).detach()
    return choosing.select(scores, k, "topk", 0.0, forced, visible)
