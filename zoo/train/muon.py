"""Muon: momentum, made orthogonal (arXiv:2502.16982; https://kellerjordan.github.io/posts/muon/).

B <- m B + (1 - m) G,  U = orthogonal((1 - m) G + m B),  W <- (1 - lr decay) W - lr 0.2 sqrt(max(rows, columns)) U

`orthogonal` takes the singular values of a matrix to about 1. The factor makes an update as large as one of AdamW, so
that both take the same learning rate. `torch.optim.Muon` computes the same of whole, two-dimensional parameters; here
they may be sharded, and [n, rows, columns] are n matrices.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

_COEFFICIENTS, _ITERATIONS, _EPS = (3.4445, -4.7750, 2.0315), 5, 1e-7


class Muon(torch.optim.Optimizer):
    """Parameters [..., rows, columns], also sharded ones: the momentum stays sharded, the matrix that is made
    orthogonal is gathered."""

    def __init__(self, params: Any, lr: float = 2e-3, momentum: float = 0.95, weight_decay: float = 0.1):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        if vectors := [tuple(p.shape) for group in self.param_groups for p in group["params"] if p.ndim < 2]:
            raise ValueError(f"Muon updates matrices, got a parameter of shape {vectors[0]}; give it to AdamW")

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                state["momentum_buffer"].mul_(momentum).add_(p.grad, alpha=1 - momentum)
                update = state["momentum_buffer"].mul(momentum).add_(p.grad, alpha=1 - momentum)
                p.mul_(1 - lr * group["weight_decay"])
                p.add_(_orthogonal(update), alpha=-lr * 0.2 * math.sqrt(max(p.shape[-2:])))


def _orthogonal(update: Tensor) -> Tensor:
    if not isinstance(update, DTensor):
        return orthogonal(update)
    mesh, placements = update.device_mesh, update.placements
    if all(isinstance(at, Replicate) or (isinstance(at, Shard) and at.dim < update.ndim - 2) for at in placements):
        own = orthogonal(update.to_local())  # a rank has whole matrices
        return DTensor.from_local(own, mesh, placements, run_check=False, shape=update.shape, stride=update.stride())
    whole = DTensor.from_local(orthogonal(update.full_tensor()), mesh, [Replicate()] * mesh.ndim, run_check=False)
    return whole.redistribute(placements=placements)


def orthogonal(matrices: Tensor) -> Tensor:
    """U V^T of each matrix U S V^T in [..., rows, columns], about: singular values between 0.7 and 1.2.

    Newton-Schulz iterations of degree five; in bfloat16 on an accelerator, as published, else in the dtype given.
    """
    a, b, c = _COEFFICIENTS
    x = matrices.bfloat16() if matrices.dtype == torch.float32 and matrices.device.type != "cpu" else matrices
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.flatten(-2).norm(dim=-1).clamp(min=_EPS)[..., None, None]
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)
