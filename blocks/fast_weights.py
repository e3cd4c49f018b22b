"""A SwiGLU network whose weights are trained while it runs: reading it, and one step of its training. No block.

f(x) = W1 (silu(W0 x) * W2 x), one network a head. A chunk of tokens makes one step up the gradient of
sum_t <f(k_t), v_t>, each token at its own three learning rates. The gradient is written out: autograd then sees
ordinary products, and goes through the step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.blocks.kv_cache import RingKVCache, segment_index
from zoo.blocks.recurrent import wide
from zoo.contract import State, counter
from zoo.segments import handed_on

Weights = tuple[Tensor, ...]  # W0 [B, H, d_h, d], W1 [B, H, d, d_h], W2 [B, H, d_h, d]

# coefficients (a, b, c) of the five Newton-Schulz steps
_NEWTON_SCHULZ = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


@dataclass
class FastWeightsState(State):
    """near: cache of the window. w0, w1, w2: what training has added to the fast weights, [B, H, ., .]; m0, m1, m2:
    the last step, where there is momentum. k, v [B, C, H, d], rates [B, C, n]: token j of the stream in slot j mod C.
    pending: upper bound over rows of the tokens in the open chunk."""

    near: RingKVCache
    w0: Tensor
    w1: Tensor
    w2: Tensor
    m0: Tensor | None
    m1: Tensor | None
    m2: Tensor | None
    k: Tensor
    v: Tensor
    rates: Tensor
    pending: int = counter()

    @property
    def moved(self) -> Weights:
        """w0, w1, w2."""
        return self.w0, self.w1, self.w2

    @property
    def step(self) -> Weights:
        """m0, m1, m2, nothing without momentum."""
        return tuple(m for m in (self.m0, self.m1, self.m2) if m is not None)

    def keep(self, k: Tensor, v: Tensor, rates: Tensor, length: Tensor) -> None:
        """Write the last tokens [B, T, ...] of a segment into their slots; length [B]: tokens before it."""
        slots = self.k.shape[1]
        slot = segment_index(length, k.shape[1])[:, -slots:] % slots
        row = torch.arange(k.shape[0], device=k.device)[:, None]
        for kept, new in ((self.k, k), (self.v, v), (self.rates, rates)):
            kept.index_put_((row, slot), handed_on(new[:, -slots:]).to(kept.dtype))


class LowRank(nn.Module):
    """w_left w_right + I / 2, one [rows, columns] matrix a head."""

    def __init__(self, heads: int, rows: int, columns: int, rank: int, *, device=None, dtype=None):
        super().__init__()
        self.w_left = nn.Parameter(torch.empty(heads, rows, rank, device=device, dtype=dtype))
        self.w_right = nn.Parameter(torch.empty(heads, rank, columns, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        for w in (self.w_left, self.w_right):
            nn.init.normal_(w, std=0.5 * w.shape[-1] ** -0.5)

    def forward(self) -> Tensor:
        w = wide(self.w_left) @ wide(self.w_right)
        return w + 0.5 * torch.eye(*w.shape[-2:], device=w.device, dtype=w.dtype)


def read(weights: Weights, q: Tensor) -> Tensor:
    """f(q) for q [B, L, H, d], products in q's dtype."""
    w0, w1, w2 = (w.to(q.dtype).mT for w in weights)
    q = q.transpose(1, 2)
    return ((F.silu(q @ w0) * (q @ w2)) @ w1).transpose(1, 2)


def ascent(weights: Weights, k: Tensor, v: Tensor, rates: Tensor) -> Weights:
    """Sum over the tokens of rate * gradient of <f(k), v>. k, v: [B, L, H, d]; rates [B, L, H, 3] of W0, W1, W2."""
    w0, w1, w2 = (w.to(k.dtype) for w in weights)
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    r0, r1, r2 = rates.transpose(1, 2).unsqueeze(-2).unbind(-1)  # [B, H, L, 1]
    z, u = k @ w0.mT, k @ w2.mT
    sigma = z.sigmoid()
    gate = z * sigma
    dh = v @ w1
    dz = dh * u * (sigma * (1 + z * (1 - sigma)))
    steps = (dz.mT @ (k * r0).to(k.dtype), v.mT @ (gate * u * r1).to(k.dtype), (dh * gate).mT @ (k * r2).to(k.dtype))
    return tuple(d.to(w.dtype) for d, w in zip(steps, weights))


def orthogonalise(g: Tensor, dtype: torch.dtype) -> Tensor:
    """U V^T, nearly, for g = U S V^T [..., m, n]: five Newton-Schulz steps (Muon), products in `dtype`."""
    tall = g.shape[-2] > g.shape[-1]
    x = g.mT if tall else g
    x = (x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)).to(dtype)
    for a, b, c in _NEWTON_SCHULZ:
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return (x.mT if tall else x).to(g.dtype)


def row_norms(w: Tensor) -> Tensor:
    """Length of each row, as a column."""
    return torch.linalg.vector_norm(w, dim=-1, keepdim=True)


def read_flops(tokens: int, dim: int, hidden: int) -> int:
    """Of `read`, for one head."""
    return 6 * tokens * dim * hidden


def ascent_flops(tokens: int, dim: int, hidden: int) -> int:
    """Of `ascent`, for one head."""
    return 12 * tokens * dim * hidden


def orthogonalise_flops(m: int, n: int) -> int:
    """Of `orthogonalise`, for one matrix."""
    m, n = min(m, n), max(m, n)
    return len(_NEWTON_SCHULZ) * (4 * m * m * n + 2 * m**3)
