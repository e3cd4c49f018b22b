"""Definition of the short causal depthwise convolution: a token loop."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def short_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, doc_ids: Tensor | None, activation: str | None
) -> tuple[Tensor, Tensor]:
    """y_t = sum_j w_j * x_{t-W+1+j} (+ b), taps outside the token's document or before the start being zero."""
    B, T, D = x.shape
    W = weight.shape[1]
    past = x.new_zeros(B, W - 1, D) if state is None else state.to(x.dtype)
    padded = torch.cat([past, x], dim=1)
    outputs = []
    for t in range(T):
        window = padded[:, t : t + W]  # [B, W, D], the last row is x_t
        if doc_ids is not None:
            index = torch.arange(t - W + 1, t + 1, device=x.device)
            same = (doc_ids[:, index.clamp(min=0)] == doc_ids[:, t : t + 1]) & (index >= 0)
            window = window * same[..., None]
        outputs.append((window * weight.t()).sum(1))
    y = torch.stack(outputs, 1)
    y = y if bias is None else y + bias
    return (F.silu(y) if activation == "silu" else y), padded[:, T:]
