"""Normalisations of the residual stream, over the last dimension, computed in fp32."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zoo.contract import DrawsItself
from zoo.registry import register
from zoo.schema import PositiveFloat


@register("rms", kind="norm", paper="arXiv:1910.07467")
class RMSNorm(nn.Module, metaclass=DrawsItself):
    """Root-mean-square norm: y = x / sqrt(mean(x^2) + eps) * w.

    x: [..., dim] -> y: [..., dim], same dtype; w starts at 1. Zhang & Sennrich 2019.
    """

    def __init__(self, dim: int, *, eps: PositiveFloat = 1e-6, device=None, dtype=None):
        super().__init__()
        self.dim, self.eps = dim, eps
        self.weight = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}"

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


@register("layer", kind="norm", paper="arXiv:1607.06450")
class LayerNorm(nn.Module, metaclass=DrawsItself):
    """Layer norm: y = (x - mean(x)) / sqrt(var(x) + eps) * w + b.

    x: [..., dim] -> y: [..., dim], same dtype; w starts at 1, b at 0 (absent with `bias=False`). Ba et al. 2016.
    """

    def __init__(self, dim: int, *, eps: PositiveFloat = 1e-5, bias: bool = True, device=None, dtype=None):
        super().__init__()
        self.dim, self.eps = dim, eps
        self.weight = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(dim, device=device, dtype=dtype)) if bias else None

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}"

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, (self.dim,), self.weight, self.bias, self.eps)
