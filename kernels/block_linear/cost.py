"""Matrix FLOPs of the structured linear maps, as `chunked` executes them; `rows` are the vectors multiplied."""

from __future__ import annotations


def block_diagonal_flops(rows: int, b: int, m: int, k: int) -> int:
    """weight [b, m, k]."""
    return 2 * rows * b * m * k


def monarch_flops(rows: int, k: int, q: int, p: int, l: int, s: int, r: int) -> int:  # noqa: E741
    """first [k, q, p], second [l, s, r]."""
    return 2 * rows * (k * q * p + l * s * r)


def blast_flops(rows: int, a: int, p: int, b: int, q: int, rank: int) -> int:
    """u [a, p, rank], s [a, b, rank], v [b, q, rank]."""
    return 2 * rows * rank * (b * q + a * b + a * p)
