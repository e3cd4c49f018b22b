"""The linear map of a layer."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """y = x W^T + b. x: [..., K]; weight: [N, K]; bias: [N]. Returns [..., N]."""
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """torch.nn.Linear."""
