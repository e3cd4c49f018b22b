"""Definition of the running selection: every prefix is sorted anew."""

from __future__ import annotations

import torch
from torch import Tensor


def prefix_topk(scores: Tensor, k: int, chunk_size: int, doc_ids: Tensor | None) -> Tensor:
    """See `zoo.kernels.prefix_topk.prefix_topk`."""
    B, T = scores.shape
    out = torch.full((B, -(-T // chunk_size), k), -1, dtype=torch.int32, device=scores.device)
    for b in range(B):
        first = 0
        for t in range(T):
            if doc_ids is not None and doc_ids[b, t] != doc_ids[b, first]:
                first = t
            if (t + 1 - first) % chunk_size == 0:
                best = sorted(range(first, t + 1), key=lambda j: (-scores[b, j].item(), j))[:k]
                chosen = torch.tensor(sorted(best), dtype=torch.int32, device=scores.device)
                out[b, (t + 1 - chunk_size) // chunk_size, : len(best)] = chosen
    return out
