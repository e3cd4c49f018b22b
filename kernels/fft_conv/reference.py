"""Definition of the long causal depthwise convolution: a token loop over direct sums."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.chunking import wide


def fft_conv(u: Tensor, k: Tensor, state: Tensor | None, doc_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """y_t = sum_l k_l * u_{t-l}, inputs outside the token's document or before the start being zero."""
    B, T, D = u.shape
    L = k.shape[0]
    past = u.new_zeros(B, L - 1, D) if state is None else state.to(u.dtype)
    padded = torch.cat([past, u], 1)
    newest_last = k.to(wide(u.dtype)).flip(0)
    outputs = []
    for t in range(T):
        window = padded[:, t : t + L].to(newest_last.dtype)  # [B, L, D], the last row is u_t
        if doc_ids is not None:
            index = torch.arange(t - L + 1, t + 1, device=u.device)
            same = (doc_ids[:, index.clamp(min=0)] == doc_ids[:, t : t + 1]) & (index >= 0)
            window = window * same[..., None]
        outputs.append((window * newest_last).sum(1))
    return torch.stack(outputs, 1).to(u.dtype), padded[:, T:]
