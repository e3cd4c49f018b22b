"""Matrix FLOPs of the grouped matrix product."""

from __future__ import annotations

from zoo.kernels.grouped_mm.chunked import BLOCK, num_blocks


def flops(rows: int, k: int, m: int) -> int:
    """Executed by `loop`, `torch` and `reference`: each row meets one weight, however rows are grouped."""
    return 2 * rows * k * m


def chunked_flops(rows: int, groups: int, k: int, m: int) -> int:
    """Executed by `chunked`, padding included."""
    return 2 * num_blocks(rows, groups) * BLOCK * k * m
