"""FLOP formulas for operators that torch's FlopCounterMode does not know. Importing this module registers them."""

from __future__ import annotations

import math

import torch
from torch.utils.flop_counter import register_flop_formula


def triangular_solve_flops(n: int, columns: int) -> int:
    """Solving [n, n] x = [n, columns] by substitution: n^2 multiply-adds halved by the triangle, times 2."""
    return n * n * columns


@register_flop_formula(torch.ops.aten.linalg_solve_triangular)
def _solve_triangular(a_shape, b_shape, *args, out_shape=None, **kwargs) -> int:
    n = a_shape[-1]
    return triangular_solve_flops(n, math.prod(b_shape) // n)
