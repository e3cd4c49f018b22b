"""The linear map of a layer, and the layer itself."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.kernels.dispatch import call, register_row
from zoo.kernels.linear import one_dnn, reference

register_row(
    "linear", "onednn", one_dnn.linear, priority=20, devices=("cpu",), dtypes=(torch.float32,),
    missing=one_dnn.missing, refuse=one_dnn.refuse,
)  # fmt: skip
register_row("linear", "torch", F.linear, priority=10)
register_row("linear", "reference", reference.linear, priority=0)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """y = x W^T + b. x: [..., K]; weight: [N, K]; bias: [N]. Returns [..., N]."""
    return call("linear", backend, x, weight, bias)


class Linear(nn.Linear):
    """torch.nn.Linear, computed by the quickest row of `linear`: the same parameters, names and initialisation."""

    def forward(self, input: Tensor) -> Tensor:
        # on a GPU, and for the single tokens of a decode step, torch's own is the quickest and asking costs time
        if input.is_cpu and input.numel() >= one_dnn.FEW * input.shape[-1]:
            return linear(input, self.weight, self.bias)
        return F.linear(input, self.weight, self.bias)
