"""Matrix FLOPs of the block-structured linear maps."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

Shape = Sequence[int] | None


def flops(rows: int, right: Shape, left: Shape = None, mix: Shape = None) -> int:
    """Of `rows` rows, by the shapes of the factors: every factor meets every row once, in every form."""
    return 2 * rows * sum(prod(shape) for shape in (right, left, mix) if shape is not None)


def backward_flops(rows: int, right: Shape, left: Shape = None, mix: Shape = None) -> int:
    """Executed by the fused backward: the gradients of inputs and weights, and what lay between the factors again."""
    again = flops(rows, right, None, mix) if left is not None else 0
    return 2 * flops(rows, right, left, mix) + again
