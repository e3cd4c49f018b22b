"""Block selection by one stable sort: torch.topk does not promise which of equal scores it takes."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.block_list import sort_ids

_HIDDEN = float("-inf")


def select(scores: Tensor, k: int, rule: str, limit: float, forced: Tensor | None, visible: Tensor | None) -> Tensor:
    """See `zoo.kernels.select.select`; returns idx int32 [B, Hs, Nq, k]."""
    if visible is not None:
        scores = torch.where(visible, scores, _HIDDEN)
    seen = scores > _HIDDEN
    ranked = scores if forced is None else torch.where(forced & seen, float("inf"), scores)
    values, order = ranked.sort(dim=-1, descending=True, stable=True)
    values, order = values[..., :k], order[..., :k]
    keep = values > _HIDDEN
    if rule == "top_p":
        share = torch.where(seen, scores, _HIDDEN).softmax(-1).gather(-1, order)
        before = share.cumsum(-1) - share
        keep = keep & ((before < limit) | (values == float("inf")))
    elif rule == "threshold":
        keep = keep & (values >= limit)
    return sort_ids(torch.where(keep, order, -1))
