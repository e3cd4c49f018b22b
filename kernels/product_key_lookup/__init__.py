"""Product-key lookup: the exact top-k of n^2 keys that are pairs of n + n half keys, and the mean of their values."""

from __future__ import annotations

from torch import Tensor

from zoo.kernels.dispatch import call, register_row
from zoo.kernels.product_key_lookup import chunked, reference

register_row("product_key_lookup", "chunked", chunked.product_key_lookup, priority=10)
register_row("product_key_lookup", "reference", reference.product_key_lookup, priority=0)


def product_key_lookup(
    query: Tensor, sub_keys: Tensor, values: Tensor, top_k: int, *, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """Slot (i, j) scores q1 . c_i + q2 . c'_j; the `top_k` best slots of each head are read with softmax weights.

    query: [N, H, k], its halves q1 and q2; sub_keys: [H, 2, n, k/2]; values: [n*n, Dv], shared by heads, slot
    (i, j) is row i n + j; top_k: 1 .. n^2. Returns out [N, Dv], the sum over heads; indices [N, H, top_k] int64;
    weights [N, H, top_k]. Scores and weights are fp32 (fp64 where the query is).
    """
    H, width = query.shape[1:]
    n = sub_keys.shape[2]
    if sub_keys.shape != (H, 2, n, width // 2) or width % 2:
        raise ValueError(
            f"sub_keys must be [H, 2, n, k/2] for a query [N, H, k], got {tuple(sub_keys.shape)} and "
            f"{tuple(query.shape)}"
        )
    if values.shape[0] != n * n:
        raise ValueError(f"values must have n^2 = {n * n} rows, got {values.shape[0]}")
    if not 1 <= top_k <= n * n:
        raise ValueError(f"top_k must be between 1 and n^2 = {n * n}, got {top_k}")
    return call("product_key_lookup", backend, query, sub_keys, values, top_k)
