"""The linear map of a layer, and the layer itself."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.kernels import native as native_core
from zoo.kernels.dispatch import call, register_row
from zoo.kernels.linear import native, one_dnn, reference

register_row(
    "linear", "native", native.linear, priority=25, devices=("cpu",), dtypes=(torch.float32, torch.float64),
    missing=functools.partial(native_core.missing, "linear"), refuse=native.refuse,
)  # fmt: skip
register_row(
    "linear", "onednn", one_dnn.linear, priority=20, devices=("cpu",), dtypes=(torch.float32,),
    missing=one_dnn.missing, refuse=one_dnn.refuse,
)  # fmt: skip
register_row("linear", "torch", F.linear, priority=10)
register_row("linear", "reference", reference.linear, priority=0)


_WORTH_ASKING = 1 << 20  # multiplications under which choosing a row takes longer than it saves


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """y = x W^T + b. x: [..., K]; weight: [N, K]; bias: [N]. Returns [..., N]."""
    return call("linear", backend, x, weight, bias)


class Linear(nn.Linear):
    """torch.nn.Linear, computed by the quickest row of `linear`: the same parameters, names and initialisation."""

    def forward(self, input: Tensor) -> Tensor:
        if input.is_cpu and input.numel() * self.out_features >= _WORTH_ASKING:
            return linear(input, self.weight, self.bias)
        return F.linear(input, self.weight, self.bias)
