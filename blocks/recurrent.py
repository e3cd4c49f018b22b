"""What the recurrent mixers share: gated head norm, short convolution, decays, the matrix memory. No block itself."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.contract import State
from zoo.kernels.short_conv import short_conv
from zoo.segments import handed_on


def default_heads(dim: int, width: int = 64, at_least: int = 4) -> int:
    """About dim / width heads, at least four, dividing dim."""
    wanted = max(at_least, dim // width)
    return next(n for n in range(wanted, 0, -1) if dim % n == 0)


def wide(x: Tensor) -> Tensor:
    """x in fp32, fp64 where it is fp64: for gates, decays and norms."""
    return x if x.dtype == torch.float64 else x.float()


def previous(carried: Tensor) -> Tensor:
    """Read a state tensor that this call will overwrite: a copy where autograd may keep it."""
    return carried.clone() if torch.is_grad_enabled() else carried


def l2_normalise(x: Tensor) -> Tensor:
    """x / sqrt(sum x^2 + 1e-6) over the last dimension."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


# -------------------------------------------------------------------------------------------- decays
def softplus_decay(a: Tensor, A_log: Tensor, dt_bias: Tensor) -> Tensor:
    """g = -exp(A_log) softplus(a + dt_bias) <= 0, in fp32 (fp64)."""
    x = wide(a) + wide(dt_bias)
    # softplus; torch's own has a backward that AOT graphs lay out wrongly
    return -wide(A_log).exp() * torch.logaddexp(x, x.new_zeros(()))


def reset_softplus_decay_(A_log: Tensor, dt_bias: Tensor, low: float, high: float) -> None:
    """exp(A_log) ~ U(low, high); softplus(dt_bias) log-uniform in [1e-3, 1e-1]."""
    nn.init.uniform_(A_log, max(low, 1e-4), high)
    nn.init.uniform_(dt_bias, math.log(1e-3), math.log(1e-1))
    with torch.no_grad():
        A_log.log_()
        step = dt_bias.exp()
        dt_bias.copy_(step + torch.log(-torch.expm1(-step)))  # inverse of softplus


def alibi_slopes(num_heads: int, like: Tensor) -> Tensor:
    """2^(-8(h+1)/H) for a power of two; else those of the lower power, then every second of the higher one."""
    lower = 1 << (num_heads.bit_length() - 1)

    def powers(n: int, count: int, step: int) -> Tensor:
        index = torch.arange(0, count * step, step, device=like.device, dtype=wide(like).dtype)
        return torch.exp2(-8 * (index + 1) / n)

    if lower == num_heads:
        return powers(lower, lower, 1)
    return torch.cat([powers(lower, lower, 1), powers(2 * lower, num_heads - lower, 2)])


# ------------------------------------------------------------------------------------------- modules
class GatedHeadNorm(nn.Module):
    """RMS norm of each head, y = x / sqrt(mean(x^2) + eps) * w, then times act(gate) where a gate is given.

    x: [B, T, H, width], gate: [B, T, H * width] -> [B, T, H * width].
    """

    def __init__(
        self, width: int, *, activation: Literal["silu", "sigmoid"] = "silu", eps: float = 1e-5, device=None, dtype=None
    ):
        super().__init__()
        self.eps, self.activation = eps, activation
        self.weight = nn.Parameter(torch.empty(width, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        y = wide(x)
        y = (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps) * wide(self.weight)).flatten(-2)
        if gate is not None:
            y = y * (F.silu(wide(gate)) if self.activation == "silu" else wide(gate).sigmoid())
        return y.to(x.dtype if gate is None else gate.dtype)

    def activation_elements(self, rows: int, gated: bool) -> int:
        """Elements kept for backward: x, what w multiplies, one factor a row; both factors of the product with the
        gate's activation, which keeps what it was computed from or (sigmoid) itself."""
        factors = 0 if not gated else 2 if self.activation == "sigmoid" else 3
        return rows * ((2 + factors) * len(self.weight) + 1)


class ShortConv(nn.Module):
    """Weights of a causal depthwise convolution, [C, 1, W] as in `nn.Conv1d`; tap W-1 is the current token."""

    def __init__(self, channels: int, width: int, *, bias: bool = False, device=None, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, width, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(channels, device=device, dtype=dtype)) if bias else None

    def reset_parameters(self) -> None:
        bound = self.weight.shape[-1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor, carried: Tensor | None, doc_ids: Tensor | None, backend: str = "auto") -> Tensor:
        """SiLU of the convolution of x [B, T, C]; carried [B, W-1, C] is overwritten with the newest inputs."""
        return silu_conv(x, self.weight, self.bias, carried, doc_ids, backend)


def silu_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, carried: Tensor | None, doc_ids: Tensor | None, backend: str
) -> Tensor:
    """SiLU(conv(x)), continuing and overwriting `carried` where given; weight: [C, 1, W]."""
    y, last = short_conv(x, weight[:, 0], bias, activation="silu", state=carried, doc_ids=doc_ids, backend=backend)
    if carried is not None:
        carried.copy_(handed_on(last))
    return y


@dataclass
class LinearState(State):
    """memory: [B, H, Dk, Dv], the sum of decayed k v^T."""

    memory: Tensor
