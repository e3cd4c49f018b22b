"""Cost of the chunked form, and the choice between its three ways."""

from __future__ import annotations


def group_size(rows: int) -> int:
    """Pairs (query tile, block) of one product of the key-major way."""
    return max(1, 64 // rows)


def num_groups(pairs: int, num_blocks: int, group: int) -> int:
    """A bound on sum_j ceil(c_j / group) for any c_j with sum c_j = pairs."""
    return pairs // group + min(num_blocks, pairs)


def choose_way(num_tiles: int, rows: int, num_keys: int, slots: int, kv_block: int, num_blocks: int) -> str:
    """The cheapest of: "mask" all keys; "gather" the listed keys of each tile of `rows` queries; "key_major".

    In logits, with what each way copies counted as so many more; the constants were fitted on a CPU. Gathered
    keys serve one tile, while a product over all keys shares them between tiles.
    """
    listed, group = slots * kv_block, group_size(rows)
    work = {
        "mask": num_tiles * rows * num_keys,
        "gather": num_tiles * (rows + min(num_tiles, 12)) * listed,
        "key_major": num_groups(num_tiles * slots, num_blocks, group) * group * rows * (kv_block + 32),
    }
    return min(work, key=work.__getitem__)


def flops(
    batch_size: int,
    num_queries: int,
    num_keys: int,
    num_heads: int,
    num_kv_heads: int,
    k_dim: int,
    v_dim: int,
    slots: int,
    kv_block: int,
    list_heads: int,
    q_tile: int = 1,
    stride: int = 0,
) -> int:
    """Matrix FLOPs of one forward; lists of `slots` blocks of `kv_block` keys for `list_heads` = Hs heads."""
    tiles = -(-num_queries // q_tile)
    rows = q_tile * (1 if list_heads > num_kv_heads else num_heads // num_kv_heads)
    blocks = -(-num_keys // (stride or kv_block))
    way = choose_way(tiles, rows, num_keys, slots, kv_block, blocks)
    group = group_size(rows)
    logits = {
        "mask": tiles * rows * num_keys,
        "gather": tiles * rows * slots * kv_block,
        "key_major": num_groups(tiles * slots, blocks, group) * group * rows * kv_block,
    }[way]
    return 2 * batch_size * (num_heads * q_tile // rows) * logits * (k_dim + v_dim)
