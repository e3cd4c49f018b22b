"""Definition of the grouped matrix product: a row loop."""

from __future__ import annotations

import torch
from torch import Tensor


def grouped_mm(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """y_n = x_n W_{e(n)}, where e(n) is the group whose rows include n."""
    groups = torch.repeat_interleave(torch.arange(len(counts), device=x.device), counts).tolist()
    matrices = weight.unbind(0)
    rows = [row @ matrices[e] for row, e in zip(x.unbind(0), groups, strict=True)]
    return torch.stack(rows) if rows else x.new_zeros(0, weight.shape[2])
