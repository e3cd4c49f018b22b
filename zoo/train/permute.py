"""A shuffle that is computed where it is asked, for rows that are too many for a table.

A Feistel network permutes the numbers of 2 b bits whatever its round function is; numbers that fall outside of
0 .. n - 1 are sent through it again until they fall inside, which leaves a permutation of 0 .. n - 1.
"""

from __future__ import annotations

import numpy as np

_ROUNDS = 6
_MASK = (1 << 64) - 1


class Permutation:
    """`p[i]` for i in 0 .. n - 1 is a permutation of them that depends on (n, seed, epoch). It takes no memory."""

    def __init__(self, n: int, seed: int, epoch: int):
        rng = np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, 0, 0, 1]))
        self.n = n
        self.half = max(1, ((n - 1).bit_length() + 1) // 2)  # 4^half is at most 4 (n - 1), and at least n
        self.keys = [int(k) for k in rng.integers(0, 1 << 64, _ROUNDS, np.uint64)]

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self.n:
            raise IndexError(index)
        low = (1 << self.half) - 1
        while True:
            left, right = index >> self.half, index & low
            for key in self.keys:
                left, right = right, left ^ (_mix(right ^ key) & low)
            index = left << self.half | right
            if index < self.n:
                return index


def _mix(x: int) -> int:
    """The finisher of splitmix64: every bit of x moves every bit of the result."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _MASK
    return x ^ x >> 31
