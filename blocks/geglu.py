"""GeGLU feed-forward network: y = W_down (gelu(W_gate x) * W_up x). Shazeer 2020, arXiv:2002.05202."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from zoo.blocks.swiglu import SwiGLU
from zoo.registry import register


@register("geglu", kind="ffn", paper="arXiv:2002.05202", examples=({"hidden_dim": 96}, {"bias": True}))
class GeGLU(SwiGLU):
    """Gated feed-forward network: y = W_down (gelu(W_gate x) * (W_up x)).

    x: [B, T, D] -> y: [B, T, D]; no state; 6 D F FLOPs a token with F = hidden_dim (default 8/3 D rounded up to
    16). gelu is its tanh formula, as in Gemma. Parameters and sizes are those of `swiglu`. A constant gate degenerates
    it to a linear map.
    Useful: all 6 D F FLOPs a token, and 3 F operations beside them.
    """

    @staticmethod
    def activation(gate: Tensor) -> Tensor:
        return F.gelu(gate, approximate="tanh")
