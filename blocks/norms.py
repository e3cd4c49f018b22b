"""Normalisations of the residual stream, over the last dimension, computed in fp32."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zoo.contract import DrawsItself
from zoo.kernels import work
from zoo.registry import register
from zoo.schema import PositiveFloat


@register("rms", kind="norm", paper="arXiv:1910.07467")
class RMSNorm(nn.Module, metaclass=DrawsItself):
    """Root-mean-square norm: y = x / sqrt(mean(x^2) + eps) * w.

    x: [..., dim] -> y: [..., dim], same dtype; w starts at 1. Zhang & Sennrich 2019. With `zero_centered` the factor
    is 1 + w and w starts at 0 (Gemma, Qwen3-Next): weight decay then pulls towards the plain norm, and a checkpoint
    of such a model is held as it is.
    Useful: 4 operations a number, no matrix products.
    """

    vector_flops = work.RMS  # a number

    def __init__(self, dim: int, *, eps: PositiveFloat = 1e-6, zero_centered: bool = False, device=None, dtype=None):
        super().__init__()
        self.dim, self.eps, self.zero_centered = dim, eps, zero_centered
        self.weight = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}" + (", zero_centered=True" if self.zero_centered else "")

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 0.0 if self.zero_centered else 1.0)

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        if self.zero_centered:
            return (y * (1 + self.weight.to(y.dtype))).to(x.dtype)  # wide: in 16 bits 1 + w would lose what w says
        return y.to(x.dtype) * self.weight

    def activation_elements(self, rows: int) -> int:
        """Elements kept for backward: x, what w multiplies, and one factor a row."""
        return rows * (2 * self.dim + 1)


@register("layer", kind="norm", paper="arXiv:1607.06450")
class LayerNorm(nn.Module, metaclass=DrawsItself):
    """Layer norm: y = (x - mean(x)) / sqrt(var(x) + eps) * w + b.

    x: [..., dim] -> y: [..., dim], same dtype; w starts at 1, b at 0 (absent with `bias=False`). Ba et al. 2016.
    Useful: 7 operations a number, no matrix products.
    """

    vector_flops = work.LAYER  # a number

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

    def activation_elements(self, rows: int) -> int:
        """Elements kept for backward: x, mean and deviation of each row."""
        return rows * (self.dim + 2)
