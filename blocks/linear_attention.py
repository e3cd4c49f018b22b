"""Linear attention: a kernel feature map in place of softmax. Katharopoulos et al. 2020, arXiv:2006.16236."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.blocks.linear_mixer import LinearMixer
from zoo.blocks.recurrent import default_heads, wide
from zoo.kernels import work
from zoo.registry import register
from zoo.schema import PositiveInt


def elu1(x: Tensor) -> Tensor:
    """elu(x) + 1, as pointwise operations: torch's own elu has a backward that AOT graphs lay out wrongly."""
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


FEATURE_MAPS = {"elu1": elu1, "relu": F.relu, "silu": F.silu, "identity": lambda x: x}
POSITIVE = ("elu1", "relu")


@register(
    "linear_attention",
    kind="mixer",
    paper="arXiv:2006.16236",
    ops=("linear_attention",),
    state_growth="constant",
    examples=(
        {"chunk_size": 16},
        {"feature_map": "relu", "num_heads": 2, "chunk_size": 16, "output_gate": True},
        {"feature_map": "silu", "normalize": False, "output_norm": True, "chunk_size": 16},
        {"feature_map": "identity", "normalize": False, "output_norm": True, "output_gate": True, "chunk_size": 24},
    ),
)
class LinearAttention(LinearMixer):
    """Linear attention: o_t = sum_{j<=t} (phi(q_t) . phi(k_j)) v_j / (sum_{j<=t} phi(q_t) . phi(k_j) + eps).

    phi: elu(x) + 1, relu, silu or identity. The denominator (`normalize`) is a column of ones beside v, so the
    memory [B, H, Dk, Dv + 1] carries it; it needs a phi that is never negative. Without it o is scaled by
    Dk^-1/2. `output_norm` and `output_gate` add the RMS norm of each head and silu(W_g x) of newer models.
    x: [B, T, D] -> y: [B, T, D]; time O(T), state H Dk (Dv + 1) numbers.
    It is what `gla` and `retention` become without decay, and `delta_rule` mixers on orthonormal keys.
    Useful: 4 Dk (Dv + 1) FLOPs a head and token.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: PositiveInt | None = None,
        head_dim: PositiveInt | None = None,
        value_head_dim: PositiveInt | None = None,
        feature_map: Literal["elu1", "relu", "silu", "identity"] = "elu1",
        normalize: bool = True,
        output_norm: bool = False,
        output_gate: bool = False,
        chunk_size: PositiveInt = 64,
        kernel: str = "auto",
        device=None,
        dtype=None,
    ):
        if normalize and feature_map not in POSITIVE:
            raise ValueError(
                f"normalize needs a feature_map that is never negative ({', '.join(POSITIVE)}), not {feature_map}: "
                "set normalize=False (and output_norm=True)"
            )
        heads = num_heads or default_heads(dim)
        head_dim = head_dim or max(dim // heads, 1)
        super().__init__(
            dim,
            heads,
            head_dim,
            value_head_dim or head_dim,
            output_norm=output_norm,
            output_gate=output_gate,
            chunk_size=chunk_size,
            kernel=kernel,
            device=device,
            dtype=dtype,
        )
        self.feature_map, self.normalize, self.eps = feature_map, normalize, 1e-6
        if normalize:
            self.scale, self.value_extra = 1.0, 1

    def features(
        self, q: Tensor, k: Tensor, state: Any, positions: Tensor | None, doc_ids: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        phi = FEATURE_MAPS[self.feature_map]
        return phi(q), phi(k)

    def values(self, v: Tensor) -> Tensor:
        # in fp32, so that the long sum of the denominator is not rounded on its way out
        return torch.cat([wide(v), wide(torch.ones_like(v[..., :1]))], -1) if self.normalize else v

    def read_out(self, o: Tensor) -> Tensor:
        return o[..., :-1] / (o[..., -1:] + self.eps) if self.normalize else o

    @property
    def key_work(self) -> int:
        per_number = {"elu1": 2, "relu": 1, "silu": work.SILU}.get(self.feature_map, 0)
        return 2 * self.key_dim * per_number

    def token_elements(self) -> int:
        # of elu + 1 its argument, the exponential and a flag; of SiLU the argument; of ReLU nothing but itself
        each = {"elu1": 9, "silu": 4}.get(self.feature_map, 0)
        return 2 * self.num_heads * self.key_dim * each // 4
