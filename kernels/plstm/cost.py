"""Executed matrix FLOPs of pLSTM on a CPU."""

from __future__ import annotations

from zoo.kernels.chunking import spans
from zoo.kernels.linear_attention.cost import flops as linear_attention_flops


def flops(
    batch_size: int,
    seq_len: int,
    num_heads: int,
    key_dim: int,
    value_dim: int,
    *,
    slots: int,
    values: int,
    outputs: int,
    chunk_size: int = 16,
    initial_state: bool = False,
) -> int:
    """One forward of `plstm` with `slots` = J, `values` = V and `outputs` = R a token; initial_state: one is given."""
    B, H, Dk, Dv, J, V, R = batch_size, num_heads, key_dim, value_dim, slots, values, outputs
    if J == V == R == 1:
        first = 2 * B * H * Dk * Dv if initial_state else 0
        return first + linear_attention_flops(B, seq_len, H, Dk, Dv)
    total = 0
    for span in spans(seq_len, chunk_size, binary=True):
        L, c, merges = span.chunk, 1, 0
        while c < L:
            merges += L // (2 * c) * 2 * J * (c * R * c * V + J * c * V + c * R * J + J * J)
            c *= 2
        pairs = 2 * L * L * Dk + 2 * L * R * L * V * Dv
        states = 2 * J * (L * V * Dv + L * Dk * Dv + J * Dk * Dv + L * Dk * Dv + L * R * Dv)
        total += (span.end - span.start + span.pad) // L * (merges + pairs + states)
    return B * H * total


def kept(seq_len: int, key_dim: int, value_dim: int, *, slots: int, chunk_size: int) -> int:
    """Elements of a head of one row that `plstm` keeps for backward, J = `slots` of inputs and outputs a token being
    more than one."""
    total, J, Dk, Dv = 0, slots, key_dim, value_dim
    for span in spans(seq_len, chunk_size, binary=True):
        L, levels = span.chunk, span.chunk.bit_length() - 1
        # both factors of the merges of two tokens, then S, M and T of each level, of the last one W and its products
        pairs = 4 * L * bool(levels) + (2 * L * levels - L - 2 if levels > 1 else 0) + 3 * L + 2 * L * L
        scores = L * L + 2 * L * Dk + 2 * L * J * Dv
        states = 2 * J * L * (Dk + Dv) + 2 * J * Dk * Dv + J * J  # read and written, before and between the chunks
        total += (span.end - span.start + span.pad) // L * (J * J * pairs + scores + states)
    return total
