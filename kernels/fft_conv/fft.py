"""Long causal convolution by Fourier transforms: y = irfft(rfft(u) rfft(k)), in O(T log T).

The transforms' circle is as long as the outputs and the filter behind them, T + L - 1, so that what wraps around
falls on the inputs of the state, whose outputs nobody asks for, or on zeros.

With documents no single product will do, as each pair of tokens has to be asked whether it is of one document. Halve
the sequence: a pair with its border between is of one document exactly if both tokens are of the document that lies
on the border, one mask on the inputs and one on the outputs of a single transform. The halves are halved in turn, all
of one size together, down to blocks of a few tokens, where each lag is asked: O(T log^2 T), exact.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.kernels.chunking import wide
from zoo.kernels.fft_conv.cost import transform_length

BLOCK = 8  # tokens of a block whose pairs are summed lag by lag


def fft_conv(u: Tensor, k: Tensor, state: Tensor | None, doc_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `zoo.kernels.fft_conv.fft_conv`."""
    T, L, dtype = u.shape[1], k.shape[0], wide(u.dtype)
    with_past = u if state is None else torch.cat([state.to(u.dtype), u], 1)
    x, taps = u.to(dtype), k.to(dtype)
    if doc_ids is not None:
        y = packed(x.transpose(1, 2), taps.t(), doc_ids).transpose(1, 2)
    elif T == 1:  # a decode step: one dot product a channel
        window = with_past.to(dtype)
        y = (window * taps[: window.shape[1]].flip(0)).sum(1, keepdim=True)
    else:
        x, taps = with_past.to(dtype), taps[: with_past.shape[1]]
        n = transform_length(T + taps.shape[0] - 1)
        spectrum = torch.fft.rfft(x.transpose(1, 2), n) * torch.fft.rfft(taps.t(), n)
        y = torch.fft.irfft(spectrum, n)[..., x.shape[1] - T : x.shape[1]].transpose(1, 2)
    before = with_past if state is not None else F.pad(u, (0, 0, L - 1, 0))
    return y.to(u.dtype), before[:, T:]


def packed(u: Tensor, k: Tensor, doc_ids: Tensor) -> Tensor:
    """u: [B, D, T]; k: [D, L]; doc_ids: [B, T] -> [B, D, T], taps inside documents."""
    T, length = u.shape[-1], BLOCK
    while length < T:
        length *= 2
    u = F.pad(u, (0, length - T))
    ids = torch.cat([doc_ids, doc_ids[:, -1:].expand(-1, length - T)], 1)[:, None]  # [B, 1, T]

    blocks, block_ids = u.unflatten(-1, (-1, BLOCK)), ids.unflatten(-1, (-1, BLOCK))
    y = blocks * k[:, :1, None]
    for lag in range(1, min(BLOCK, k.shape[1])):
        same = block_ids[..., lag:] == block_ids[..., :-lag]
        y = y + F.pad(blocks[..., :-lag] * same * k[:, lag, None, None], (lag, 0))
    y = y.flatten(-2)

    half = BLOCK
    while half < T:  # each pair of neighbouring runs of `half` tokens: from the left one into the right one
        left, _ = u.unflatten(-1, (-1, 2, half)).unbind(-2)
        left_ids, right_ids = ids.unflatten(-1, (-1, 2, half)).unbind(-2)
        border = left_ids[..., -1:]
        spectrum = torch.fft.rfft(left * (left_ids == border), 2 * half)
        spectrum = spectrum * torch.fft.rfft(k[:, : 2 * half], 2 * half)[:, None]
        right = torch.fft.irfft(spectrum, 2 * half)[..., half:] * (right_ids == border)
        y = y + F.pad(right, (half, 0)).flatten(-2)
        half *= 2
    return y[..., :T]
