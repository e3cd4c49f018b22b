"""Based: linear attention whose feature map is the second-order Taylor series of exp. Arora et al. 2024,
arXiv:2402.18668."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.blocks.grafting import low_rank, take
from zoo.blocks.linear_mixer import LinearMixer
from zoo.blocks.recurrent import default_heads, wide
from zoo.registry import register
from zoo.schema import PositiveInt


def taylor_features(x: Tensor) -> Tensor:
    """phi(x) [..., 1 + d + d (d + 1) / 2] of x [..., d] with phi(q) . phi(k) = 1 + s + s^2 / 2, s = q . k / sqrt(d).

    The second-order part is symmetric, so each product x_i x_j stands once: d(d + 1)/2 features in place of d^2.
    """
    d = x.shape[-1]
    x = wide(x) * d**-0.25
    row, column = torch.triu_indices(d, d, device=x.device)
    weight = torch.where(row == column, x.new_full((), 0.5**0.5), x.new_ones(()))
    return torch.cat([torch.ones_like(x[..., :1]), x, x[..., row] * x[..., column] * weight], -1)


@register(
    "based",
    kind="mixer",
    paper="arXiv:2402.18668",
    ops=("linear_attention",),
    state_growth="constant",
    examples=(
        {"num_heads": 4, "feature_dim": 8, "chunk_size": 16},
        {"num_heads": 2, "feature_dim": 4, "head_dim": 24, "chunk_size": 24},
    ),
)
class Based(LinearMixer):
    """Taylor linear attention: o_t = sum_{j<=t} phi(q_t).phi(k_j) v_j / sum_{j<=t} phi(q_t).phi(k_j).

    phi(q).phi(k) = 1 + s + s^2/2 with s = q.k / sqrt(F), F = feature_dim: the exponential of softmax attention to
    second order. It is at least 1/2, so the denominator, a column of ones beside v, is never near zero.
    q, k: [B, T, H, F]; v: [B, T, H, d]. x: [B, T, D] -> y: [B, T, D]; no positions, no gate.
    Time O(T); state H (1 + F + F(F+1)/2) (d + 1) numbers: the symmetric products stand once, where the paper's
    code keeps all 1 + F + F^2, with the same scores.
    The paper's models hold such layers beside short convolutions and `attention` with a small window, which looks
    closely where this one looks far (configs/based_small.yaml). `jrt` without a prefix is this block.
    Useful: 4 (1 + F + F(F+1)/2) (d + 1) FLOPs a head and token.
    """

    value_extra = 1

    def __init__(
        self,
        dim: int,
        *,
        num_heads: PositiveInt | None = None,
        feature_dim: PositiveInt = 16,
        head_dim: PositiveInt | None = None,
        chunk_size: PositiveInt = 64,
        kernel: str = "auto",
        device=None,
        dtype=None,
    ):
        heads = num_heads or default_heads(dim)
        if head_dim is None and dim % heads:
            raise ValueError(f"num_heads={heads} does not divide dim={dim}: change it or give head_dim")
        super().__init__(
            dim,
            heads,
            feature_dim,
            head_dim or dim // heads,
            output_norm=False,
            output_gate=False,
            chunk_size=chunk_size,
            kernel=kernel,
            device=device,
            dtype=dtype,
        )
        self.scale, self.eps = 1.0, 1e-12

    @torch.no_grad()
    def from_attention(self, q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> tuple[str, ...]:
        """Queries and keys of feature_dim channels a head whose products are nearest to those of attention."""
        if len(q) % self.num_heads or len(q) != len(k) or len(q) == len(self.q_proj.weight):
            return ()
        q, k = low_rank(q, k, self.num_heads, self.key_dim)
        return take(("q_proj.weight", self.q_proj.weight, q), ("k_proj.weight", self.k_proj.weight, k))

    @property
    def memory_dim(self) -> int:
        return 1 + self.key_dim + self.key_dim * (self.key_dim + 1) // 2

    def features(
        self, q: Tensor, k: Tensor, state: Any, positions: Tensor | None, doc_ids: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return taylor_features(q), taylor_features(k)

    def values(self, v: Tensor) -> Tensor:
        return torch.cat([wide(v), wide(torch.ones_like(v[..., :1]))], -1)

    def read_out(self, o: Tensor) -> Tensor:
        return o[..., :-1] / (o[..., -1:] + self.eps)

    @property
    def key_work(self) -> int:
        return 2 * self.memory_dim  # products of queries, and of keys

    def token_elements(self) -> int:
        # both factors of the products of two channels, and the products, of q and k
        return 4 * self.num_heads * (self.memory_dim - 1 - self.key_dim)
