"""FLOP formulas for CPU ops that torch's FlopCounterMode counts as zero."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula

aten = torch.ops.aten


def triangular_solve_flops(n: int, columns: int) -> int:
    """Solving [n, n] x = [n, columns] by substitution: n^2 multiply-adds halved by the triangle, times 2."""
    return n * n * columns


def _sdpa(q, k, v, *args, out_shape=None, **kwargs) -> int:
    # the full product, as torch counts its CUDA kernels, also where a causal kernel skips half of it
    B, H, T, D = q
    return 2 * B * H * T * k[2] * (D + v[3])


def _sdpa_backward(grad_out, q, k, v, *args, out_shape=None, **kwargs) -> int:
    # scores again, and the gradients of p, v, q and k
    B, H, T, D = q
    return 2 * B * H * T * k[2] * (3 * D + 2 * v[3])


def _grouped_mm(a, b, *args, out_shape=None, **kwargs) -> int:
    # groups cut the rows of a, the inner dimension (two 2D operands) or the columns of b (3D x 2D)
    return 2 * prod(a if len(b) == 3 or len(a) == 2 else a[1:]) * b[-1]


def _solve_triangular(a, b, *args, out_shape=None, **kwargs) -> int:
    n, batch = a[-1], prod(torch.broadcast_shapes(a[:-2], b[:-2]))
    return batch * triangular_solve_flops(n, b[-1] * b[-2] // n)


def _register(target, formula: Callable) -> None:
    if target not in flop_registry:  # a newer torch may count it itself
        register_flop_formula(target)(formula)


_register(aten._scaled_dot_product_flash_attention_for_cpu, _sdpa)
_register(aten._scaled_dot_product_flash_attention_for_cpu_backward, _sdpa_backward)
_register(aten._grouped_mm, _grouped_mm)
_register(aten.linalg_solve_triangular, _solve_triangular)
