"""Executed matrix FLOPs of chunked linear attention."""

from __future__ import annotations

from typing import Literal

from zoo.kernels.chunking import spans, vector_score_flops

DecayKind = Literal["none", "head", "channel"]
INTERVAL = 64  # tokens between the states that the compiled rows keep for backward


def flops(
    batch_size: int,
    seq_len: int,
    num_heads: int,
    key_dim: int,
    value_dim: int,
    *,
    num_groups: int | None = None,
    chunk_size: int = 64,
    decay: DecayKind = "head",
) -> int:
    """One forward of `linear_attention`; num_groups: heads of q and k (default num_heads); decay: no decay, one
    per head (constant or not), or one per key channel."""
    H, G, Dk, Dv = num_heads, num_groups or num_heads, key_dim, value_dim
    if seq_len == 1:
        return 2 * batch_size * H * Dk * Dv
    total = 0
    for span in spans(seq_len, chunk_size, binary=decay == "channel"):
        C = span.chunk
        scores = H * vector_score_flops(C, Dk) if decay == "channel" else G * 2 * C * C * Dk
        chunks = (span.end - span.start + span.pad) // C
        total += chunks * (scores + H * (2 * C * C * Dv + 4 * C * Dk * Dv))
    return batch_size * total
