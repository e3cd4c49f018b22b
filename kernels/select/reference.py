"""Definition of block selection: a loop over rows with Python's own sort."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def select(scores: Tensor, k: int, rule: str, limit: float, forced: Tensor | None, visible: Tensor | None) -> Tensor:
    """See `zoo.kernels.select.select`; returns idx int32 [B, Hs, Nq, k]."""
    shape = scores.shape
    if visible is not None:
        scores = torch.where(visible, scores, -math.inf)
    must = torch.zeros_like(scores, dtype=torch.bool) if forced is None else forced.expand(shape)
    lists = []
    for row, force in zip(scores.reshape(-1, shape[-1]).tolist(), must.reshape(-1, shape[-1]).tolist()):
        seen = [j for j in range(shape[-1]) if row[j] > -math.inf]
        best = max((row[j] for j in seen), default=0.0)
        total = sum(math.exp(row[j] - best) for j in seen)
        chosen, mass = [], 0.0
        for j in sorted(seen, key=lambda j: (-math.inf if force[j] else -row[j], j))[:k]:
            if (
                force[j]
                or rule == "topk"
                or (rule == "top_p" and mass < limit)
                or (rule == "threshold" and row[j] >= limit)
            ):
                chosen.append(j)
            mass += math.exp(row[j] - best) / total
        lists.append(sorted(chosen) + [-1] * (k - len(chosen)))
    return torch.tensor(lists, dtype=torch.int32, device=scores.device).reshape(*shape[:-1], k)
