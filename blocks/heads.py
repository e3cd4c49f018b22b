"""How many heads, and how wide: what every attention asks of its options. No block."""

from __future__ import annotations


def default_num_heads(dim: int, head_dim: int = 64) -> int:
    """The largest number of heads that divides `dim` into heads of at least `head_dim` channels."""
    return next(h for h in range(max(dim // head_dim, 1), 0, -1) if dim % h == 0)


def grouped_heads(
    dim: int, num_heads: int | None, num_kv_heads: int | None, head_dim: int | None, *, rotated: bool = False
) -> tuple[int, int, int]:
    """Query heads, key-value heads and channels of a head, with defaults for what is not given. ValueError where
    they do not fit each other, or where heads that are `rotated` have an odd number of channels."""
    num_heads = num_heads or default_num_heads(dim)
    num_kv_heads = num_kv_heads or num_heads
    if num_heads % num_kv_heads:
        raise ValueError(f"num_kv_heads={num_kv_heads} must divide num_heads={num_heads}")
    if head_dim is None and dim % num_heads:
        raise ValueError(f"num_heads={num_heads} does not divide dim={dim}: change it or give head_dim")
    head_dim = head_dim or dim // num_heads
    if rotated and head_dim % 2:
        raise ValueError(f"head_dim={head_dim} must be even to be rotated: give another head_dim or num_heads")
    return num_heads, num_kv_heads, head_dim
