"""Executed matrix FLOPs of attention on the CPU."""

from __future__ import annotations

from zoo.kernels.attention.mask import tiles
from zoo.kernels.merge_lse import kept as merged


def attention_flops(
    batch_size: int,
    num_queries: int,
    num_keys: int,
    num_heads: int,
    head_dim: int,
    value_dim: int | None = None,
    *,
    causal: bool = True,
    window: int | None = None,
    sinks: int = 0,
    plain: bool = True,
    fused: bool = True,
) -> int:
    """Score and value products of `attention`. `plain`: called without order indices (window and causality
    then save work); `fused`: run by sdpa, which is counted as the full product, not the causal half."""
    value_dim = head_dim if value_dim is None else value_dim
    if plain and window is not None and window >= num_keys:
        window, sinks = None, 0
    width = 2 * max(head_dim, value_dim) if fused else head_dim + value_dim
    if fused and window is None:
        pairs = num_queries * num_keys
    else:
        cuts = tiles(num_queries, num_keys, causal, window, sinks, plain, fused)
        pairs = sum((t.stop - t.start) * t.num_keys for t in cuts)
    return 2 * batch_size * num_heads * pairs * width


def two_copies_kept(tokens: int, heads: int, value_dim: int, causal: bool) -> int:
    """Elements that attention over `TwoCopies` of so many tokens keeps for backward beyond what it keeps of a row of
    twice as many: a noisy token has two outputs with denominators, which are merged, and all are copied into one row;
    places in the row are int64, those of the queries and of the keys."""
    outputs = heads * (3 * value_dim + 1) + merged(2, heads, value_dim)
    return tokens * (outputs + 2 * (2 if causal else 3))
