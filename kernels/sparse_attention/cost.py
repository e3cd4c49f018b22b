"""Cost of the chunked form, and the choice between its two ways."""

from __future__ import annotations


def prefers_dense(num_tiles: int, rows: int, num_keys: int, listed: int) -> bool:
    """Whether masking all `num_keys` is cheaper than gathering the `listed` keys of each tile of `rows` queries.

    Gathered keys are copied for one tile only, while a dense product shares its keys between the tiles; the
    factor was fitted on a CPU.
    """
    return rows * num_keys <= (rows + min(num_tiles, 12)) * listed


def flops(
    batch_size: int,
    num_queries: int,
    num_keys: int,
    num_heads: int,
    num_kv_heads: int,
    k_dim: int,
    v_dim: int,
    listed: int,
    list_heads: int,
    q_tile: int = 1,
) -> int:
    """Matrix FLOPs of one forward; `listed` = slots of a list * kv_block, `list_heads` = Hs."""
    tiles = -(-num_queries // q_tile)
    rows = q_tile * (1 if list_heads > num_kv_heads else num_heads // num_kv_heads)
    keys = num_keys if prefers_dense(tiles, rows, num_keys, listed) else listed
    return 2 * batch_size * num_heads * tiles * q_tile * keys * (k_dim + v_dim)
