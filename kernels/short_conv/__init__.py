"""Short causal depthwise convolution, the local mixer in front of most recurrent blocks."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from zoo import row
from zoo.kernels import gpu, slices
from zoo.kernels import native as native_core
from zoo.kernels.dispatch import call, register_row
from zoo.kernels.short_conv import chunked, native, reference

gpu.register_triton_row("short_conv", "zoo.kernels.short_conv.triton:short_conv", refuse=native.refuse_fused)
register_row(
    "short_conv", "native", native.short_conv, priority=20, devices=("cpu",), dtypes=(torch.float32, torch.float64),
    missing=functools.partial(native_core.missing, "short_conv"), refuse=native.refuse,
)  # fmt: skip
register_row("short_conv", "chunked", chunked.short_conv, priority=10)
register_row("short_conv", "reference", reference.short_conv, priority=0)


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    state: Tensor | None = None,
    doc_ids: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Causal depthwise convolution over time.

    x: [B, T, D]; weight: [D, W], tap W-1 multiplies the current token; bias: [D]; state: [B, W-1, D], the
    inputs before x (zeros where None); doc_ids: [B, T], taps do not cross documents; activation: "silu" or
    None. Returns y [B, T, D] and the new state [B, W-1, D].
    """

    def run(x: Tensor, state: Tensor | None, doc_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        return call("short_conv", backend, x, weight, bias, state, doc_ids, activation)

    if (part := row.current()) is not None:
        return slices.short_conv(part, run, x, weight.shape[1], state, doc_ids)
    return run(x, state, doc_ids)
