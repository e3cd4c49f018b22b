"""Executed matrix FLOPs of the chunked diagonal plus low-rank recurrence, triangular solves included."""

from __future__ import annotations

from zoo.kernels.chunking import spans, vector_score_flops
from zoo.kernels.dplr.chunked import SHORT
from zoo.kernels.flops import triangular_solve_flops


def flops(batch_size: int, seq_len: int, num_heads: int, key_dim: int, value_dim: int, *, chunk_size: int = 64) -> int:
    """One forward of `dplr`."""
    Dk, Dv = key_dim, value_dim
    if seq_len <= SHORT:
        return 4 * batch_size * seq_len * num_heads * Dk * Dv
    total = 0
    for span in spans(seq_len, chunk_size, binary=True):
        C = span.chunk
        chunks = (span.end - span.start + span.pad) // C
        total += chunks * (
            4 * vector_score_flops(C, Dk) + triangular_solve_flops(C, Dk + Dv) + 8 * C * Dk * Dv + 6 * C * C * Dv
        )
    return batch_size * num_heads * total
