"""Rows of several sources in fixed proportions.

Which source row i comes from is a function of (weights, seed, i), as in drawing a line on a grid: of the rows before i
the first source has floor(i w + u), u in [0, 1) from the seed, and among the others it is the same again. So the
shares are not drawn by chance: every window of n rows, whatever its place, has n w rows of a source, to within the
number of sources. The rows of a source come one after the other, none is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from zoo.train.loader import Row, Rows


class MixedRows:
    """Row i is a row of one of `rows`, in proportion to `weights`."""

    def __init__(self, rows: Sequence[Rows], weights: Sequence[float], seed: int):
        self.rows = rows
        shares = [Fraction(str(w)) for w in weights]
        rng = np.random.Generator(np.random.Philox(key=[seed, 2]))
        # (numerator, denominator, offset) of the share of each source among itself and those behind it
        self.lines: list[tuple[int, int, int]] = []
        for i, share in enumerate(shares[:-1]):
            part = share / sum(shares[i:])
            self.lines.append((part.numerator, part.denominator, int(rng.random() * part.denominator)))

    def source(self, index: int) -> tuple[int, int]:
        """Number of the source, and the index of the row in it."""
        for number, (share, of, offset) in enumerate(self.lines):
            before = (index * share + offset) // of
            if ((index + 1) * share + offset) // of > before:
                return number, before
            index -= before
        return len(self.lines), index

    def row(self, index: int) -> Row:
        """Row of a global index."""
        number, inside = self.source(index)
        return self.rows[number].row(inside)
