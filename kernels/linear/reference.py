"""Definition of the linear map."""

from __future__ import annotations

import torch
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y_n = sum_k W_nk x_k + b_n."""
    y = torch.einsum("...k,nk->...n", x, weight)
    return y if bias is None else y + bias
