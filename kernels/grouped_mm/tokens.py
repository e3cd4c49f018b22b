"""Inference of a few tokens through SwiGLU experts by a C core: to sort, count and gather one token's rows costs more
than to read its experts."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels import native
from zoo.kernels.dispatch import forced

MOST = 8  # tokens: each reads its experts anew, which more tokens had better share


def swiglu_tokens(x: Tensor, experts: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor | None:
    """y_n = sum_j w_nj D_e (silu(G_e x_n) * (U_e x_n)) with e = experts_nj, or None where grouped products must do it.

    x: [N, D]; experts: int64 [N, k]; weights: [N, k]; gate_up: [E, 2 I, D], gate rows first; down: [E, D, I].
    It refuses more than a few tokens, gradients, tracing and counting, a forced backend, all but float32 and float64
    on a CPU.
    """
    N, k = experts.shape
    if not 0 < N <= MOST or x.device.type != "cpu" or not x.dtype == weights.dtype == gate_up.dtype == down.dtype:
        return None
    if (
        native.watched(x, weights, gate_up, down)
        or forced("grouped_mm")
        or x.dtype not in (torch.float32, torch.float64)
        or native.missing("grouped_mm")
    ):
        return None
    D, width = down.shape[1:]
    y, scratch = x.new_empty(N, D), x.new_empty(2 * width + D)
    given = [t.contiguous() for t in (x, experts, weights, gate_up, down)]
    native.run("grouped_mm", "swiglu_tokens", x.dtype, *given, scratch, y, N, k, D, width)
    return y
