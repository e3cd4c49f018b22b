"""Structured linear maps made of blocks: block-diagonal, Monarch and BLAST.

Rows take (x [N, in], first [b, c, in / b], second or None, scales or None): the first block-diagonal product, then
for Monarch the second one between two permutations, or for BLAST the scaled sum over blocks and the second one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels import gpu
from zoo.kernels.block_linear import chunked, reference
from zoo.kernels.dispatch import call, register_row


def _triton_refuses(x: Tensor, *factors: Tensor | None) -> str | None:
    wrong = [str(f.dtype) for f in factors if f is not None and f.dtype != x.dtype]
    return f"needs one dtype, x is {x.dtype} and a factor {wrong[0]}" if wrong else None


gpu.register_triton_row("block_linear", "zoo.kernels.block_linear.fused:block_linear", refuse=_triton_refuses)
register_row("block_linear", "chunked", chunked.block_linear, priority=10)
register_row("block_linear", "reference", reference.block_linear, priority=0)


def block_diagonal(x: Tensor, weight: Tensor, *, backend: str = "auto") -> Tensor:
    """y_i = W_i x_i for the blocks x_i of x.

    x: [..., b k]; weight: [b, m, k]. Returns [..., b m] in x's dtype (under autocast in its dtype, as matmul does).
    """
    _check(weight.ndim == 3 and x.shape[-1] == weight.shape[0] * weight.shape[2],
           "block_diagonal takes x [..., b k] and weight [b, m, k]", x, weight)  # fmt: skip
    return _call(backend, x, weight, None, None)


def monarch(x: Tensor, first: Tensor, second: Tensor, *, backend: str = "auto") -> Tensor:
    """y = P2 L P1 R x with block-diagonal R and L: Monarch (Dao et al. 2022, arXiv 2204.00595).

    x: [..., k p]; first (R): [k, q, p]; second (L): [l, s, r] with l r = k q. P1 reads R x as a matrix [r, l] and
    gives column λ to block λ of L; P2 puts output σ of block λ at place σ l + λ. Each of the k x l blocks of the
    whole has rank q / l (where l divides q). Returns [..., s l].
    """
    _check(first.ndim == 3 and second.ndim == 3 and x.shape[-1] == first.shape[0] * first.shape[2]
           and first.shape[0] * first.shape[1] == second.shape[0] * second.shape[2],
           "monarch takes x [..., k p], first [k, q, p], second [l, s, r], l r = k q", x, first, second)  # fmt: skip
    return _call(backend, x, first, second, None)


def blast(x: Tensor, u: Tensor, s: Tensor, v: Tensor, *, backend: str = "auto") -> Tensor:
    """y_i = U_i Σ_j s_ij ⊙ (V_j^T x_j): BLAST (Lee et al. 2024, arXiv 2410.21262).

    x: [..., b q]; u: [a, p, r]; s: [a, b, r]; v: [b, q, r]; a = b in the paper. Block (i, j) of the matrix is
    U_i diag(s_ij) V_j^T; s = 1 gives a low-rank matrix, s_ij = 0 for i != j a block-diagonal one. Returns [..., a p].
    """
    _check(u.ndim == s.ndim == v.ndim == 3 and x.shape[-1] == v.shape[0] * v.shape[1]
           and s.shape == (u.shape[0], v.shape[0], v.shape[2]) and u.shape[2] == v.shape[2],
           "blast takes x [..., b q], u [a, p, r], s [a, b, r], v [b, q, r]", x, u, s, v)  # fmt: skip
    return _call(backend, x, v.transpose(1, 2), u, s)


def _check(right: bool, wanted: str, *given: Tensor) -> None:
    if not right:
        raise ValueError(f"{wanted}; got {', '.join(str(list(g.shape)) for g in given)}")


def _call(backend: str, x: Tensor, *factors: Tensor | None) -> Tensor:
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        half = torch.get_autocast_dtype(device)
        x, *factors = (f if f is None else f.to(half) for f in (x, *factors))
    y = call("block_linear", backend, x.reshape(-1, x.shape[-1]), *factors)
    return y.reshape(*x.shape[:-1], y.shape[-1])
