"""Long causal depthwise convolution: a filter as long as the sequence for each channel."""

from __future__ import annotations

from torch import Tensor

from zoo.kernels.dispatch import call, register_row
from zoo.kernels.fft_conv import fft, reference
from zoo.kernels.fft_conv.cost import flops, transform_length

__all__ = ["fft_conv", "flops", "transform_length"]

register_row("fft_conv", "fft", fft.fft_conv, priority=10)
register_row("fft_conv", "reference", reference.fft_conv, priority=0)


def fft_conv(
    u: Tensor, k: Tensor, *, state: Tensor | None = None, doc_ids: Tensor | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """y_t = sum_l k_l * u_{t-l}, over the L taps of k; a skip D * u is D added to tap 0.

    u: [B, T, D]; k: [L, D], tap 0 multiplies the current token; state: [B, L-1, D], the inputs before u (zeros where
    None); doc_ids: [B, T], taps do not cross documents, and a state before documents belongs to none of them. Returns
    y [B, T, D] in u's dtype, summed in float32 (float64 for float64), and the new state [B, L-1, D].
    """
    if u.shape[-1:] != k.shape[1:]:
        raise ValueError(f"fft_conv: u must be [B, T, D] and k [L, D], got {list(u.shape)} and {list(k.shape)}")
    return call("fft_conv", backend, u, k, state, doc_ids)
