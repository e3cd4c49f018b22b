"""Linear maps whose matrix is structured in blocks: block-diagonal, Monarch (arXiv:2204.00595), BLAST (2410.21262).

One op, y = (left . mix . right) x, whose parts are block-diagonal products but for the mixing of blocks between
them. A low-rank map is two dense products and needs no kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels import gpu
from zoo.kernels.block_linear import chunked, fused, reference
from zoo.kernels.dispatch import call, register_row

gpu.register_triton_row("block_linear", "zoo.kernels.block_linear.fused:block_linear", refuse=fused.refuse)
register_row("block_linear", "chunked", chunked.block_linear, priority=10)
register_row("block_linear", "reference", reference.block_linear, priority=0)


def block_diagonal(x: Tensor, weight: Tensor, *, backend: str = "auto") -> Tensor:
    """y_k = W_k x_k for each block k of x.

    x: [..., b p]; weight: [b, q, p]. Returns [..., b q] in x's dtype (under autocast in its dtype, as matmul does).
    """
    return _call(x, weight, None, None, backend)


def monarch(x: Tensor, right: Tensor, left: Tensor, *, backend: str = "auto") -> Tensor:
    """Two block-diagonal products with a transposition of blocks and features after each.

    x: [..., k p]; right: [k, q, p]; left: [l, s, r] with l r = k q. t = block_diagonal(x, right) is read as
    [r, l], so that z[lambda, rho] = t[rho l + lambda]; y[sigma l + lambda] = sum_rho left[lambda, sigma, rho]
    z[lambda, rho]. Returns [..., s l].
    """
    if left.ndim == right.ndim == 3 and left.shape[0] * left.shape[2] != right.shape[0] * right.shape[1]:
        raise ValueError(
            f"monarch: right {tuple(right.shape)} gives {right.shape[0] * right.shape[1]} features, left "
            f"{tuple(left.shape)} takes {left.shape[0] * left.shape[2]}; k q must be l r"
        )
    return _call(x, right, left, None, backend)


def blast(x: Tensor, left: Tensor, mix: Tensor, right: Tensor, *, backend: str = "auto") -> Tensor:
    """y_i = U_i sum_j diag(s_ij) V_j x_j.

    x: [..., c p], c blocks; left U: [b, q, r]; mix s: [b, c, r]; right V: [c, r, p]. Returns [..., b q].
    """
    wanted = (left.shape[0], right.shape[0], left.shape[-1])
    if left.ndim != 3 or right.ndim != 3 or tuple(mix.shape) != wanted or right.shape[1] != wanted[2]:
        raise ValueError(
            f"blast: left {tuple(left.shape)}, mix {tuple(mix.shape)} and right {tuple(right.shape)} do not agree; "
            "they must be [b, q, r], [b, c, r], [c, r, p]"
        )
    return _call(x, right, left, mix, backend)


def _call(x: Tensor, right: Tensor, left: Tensor | None, mix: Tensor | None, backend: str) -> Tensor:
    if any(w is not None and w.ndim != 3 for w in (right, left)):
        raise ValueError("the weights of a block-diagonal product are [blocks, outputs, inputs]")
    if x.shape[-1] != right.shape[0] * right.shape[2]:
        raise ValueError(f"x has {x.shape[-1]} features, the first product {tuple(right.shape)} takes "
                         f"{right.shape[0] * right.shape[2]}")  # fmt: skip
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        half = torch.get_autocast_dtype(device)
        x, right, left, mix = (None if t is None else t.to(half) for t in (x, right, left, mix))
    y = call("block_linear", backend, x.reshape(-1, x.shape[-1]), right, left, mix)
    return y.view(*x.shape[:-1], y.shape[-1])
