"""Executed matrix FLOPs of the chunked delta rule, triangular solves included."""

from __future__ import annotations

from zoo.kernels.chunking import spans, vector_score_flops
from zoo.kernels.delta_rule.chunked import SHORT
from zoo.kernels.flops import triangular_solve_flops


def flops(
    batch_size: int,
    seq_len: int,
    num_heads: int,
    key_dim: int,
    value_dim: int,
    *,
    num_groups: int | None = None,
    chunk_size: int = 64,
    channel_decay: bool = False,
) -> int:
    """One forward of `delta_rule`; num_groups: heads of q and k (default num_heads)."""
    H, G, Dk, Dv = num_heads, num_groups or num_heads, key_dim, value_dim
    if seq_len <= SHORT:
        return 4 * batch_size * seq_len * H * Dk * Dv
    total = 0
    for span in spans(seq_len, chunk_size, binary=channel_decay):
        C = span.chunk
        scores = 2 * H * vector_score_flops(C, Dk) if channel_decay else 2 * G * 2 * C * C * Dk
        chunks = (span.end - span.start + span.pad) // C
        each_head = triangular_solve_flops(C, Dk + Dv) + 6 * C * Dk * Dv + 2 * C * C * Dv
        total += chunks * (scores + H * each_head)
    return batch_size * total
