"""Definition of the product-key lookup: every token scores all n^2 slots."""

from __future__ import annotations

import torch
from torch import Tensor


def product_key_lookup(query: Tensor, sub_keys: Tensor, values: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """out = sum_h sum_{s in top_k} softmax(score)_s V_s with score_(i,j) = q1 . c_i + q2 . c'_j."""
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    outputs, indices, weights = [], [], []
    for token in query.to(wide).unbind(0):
        out, chosen, shares = 0, [], []
        for q, keys in zip(token.unbind(0), sub_keys.to(wide).unbind(0), strict=True):
            q1, q2 = q.chunk(2)
            score = (keys[0] @ q1)[:, None] + (keys[1] @ q2)[None, :]  # [n, n]
            best = score.flatten().topk(top_k)
            share = best.values.softmax(0)
            out = out + share @ values[best.indices].to(wide)
            chosen.append(best.indices)
            shares.append(share)
        outputs.append(out)
        indices.append(torch.stack(chosen))
        weights.append(torch.stack(shares))
    return torch.stack(outputs).to(values.dtype), torch.stack(indices), torch.stack(weights)
