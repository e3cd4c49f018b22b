"""Matrix FLOPs of the product-key lookup."""

from __future__ import annotations


def flops(tokens: int, heads: int, num_keys: int, key_dim: int) -> int:
    """Executed by `chunked`: scores of both halves, `key_dim` being the width of the whole key. Reading the
    values is memory traffic, not matrix work."""
    return 2 * tokens * heads * num_keys * key_dim
