"""Product-key lookup in 2 n scores a head: a slot among the best K has both its halves among the best K."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.kernels.precision import no_autocast


def product_key_lookup(query: Tensor, sub_keys: Tensor, values: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `zoo.kernels.product_key_lookup.product_key_lookup`."""
    N, H, width = query.shape
    n = sub_keys.shape[2]
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    halves = query.reshape(N, 2 * H, width // 2).transpose(0, 1).to(wide)
    keys = sub_keys.reshape(2 * H, n, width // 2).transpose(1, 2).to(wide)
    with no_autocast(query.device):
        scores = torch.bmm(halves, keys)  # [2H, N, n]
    kept = min(top_k, n)
    best, where = scores.transpose(0, 1).reshape(N, H, 2, n).topk(kept, dim=-1)
    pairs = (best[:, :, 0, :, None] + best[:, :, 1, None, :]).flatten(2)
    slots = (where[:, :, 0, :, None] * n + where[:, :, 1, None, :]).flatten(2)
    top, chosen = pairs.topk(top_k, dim=-1)
    indices, weights = slots.gather(2, chosen), top.softmax(-1)
    # embedding_bag never forms the [N, H K, Dv] rows that a gather would
    out = F.embedding_bag(
        indices.flatten(1), values, mode="sum", per_sample_weights=weights.flatten(1).to(values.dtype)
    )
    return out, indices, weights
