"""Hyena: gates between long convolutions whose filters a small network generates. Poli et al. 2023, arXiv:2302.10866.

With * elementwise, conv a causal convolution over time and n the order:
    x_0, ..., x_{n-1}, v = shortconv(W_in input)
    v <- conv(v * x_i; h_i) + b_i (v * x_i)  for i = n-1, ..., 1;  output = W_out (v * x_0)
    h_i(l) = MLP(features(l)) exp(-l delta / (L - 1)),  l < L:  sine activations, a decay delta for each channel
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.blocks.grafting import SMALL, pass_through_
from zoo.blocks.recurrent import ShortConv, previous, wide
from zoo.contract import Block, ParallelPlan, State, init_linear_, linear_flops, refuse_packed_streaming
from zoo.kernels.dispatch import check_backend
from zoo.kernels.fft_conv import fft_conv, transform_length
from zoo.kernels.fft_conv import flops as fft_conv_flops
from zoo.kernels.linear import Linear
from zoo.kernels.precision import no_autocast
from zoo.kernels.short_conv import short_conv
from zoo.registry import register
from zoo.schema import PositiveFloat, PositiveInt, Range
from zoo.segments import handed_on

WINDOW = (-math.log(1e-2) / 1.5, -math.log(1e-2) / 0.3)  # delta: down to 1 % after 1.5 and 0.3 filter lengths


@dataclass
class HyenaState(State):
    """conv: [B, W-1, (n+1) D], the newest inputs of the short convolution; past: [B, n-1, L-1, D], those of each long
    one."""

    conv: Tensor
    past: Tensor


class Sine(nn.Module):
    """sin(freq * x), one trained frequency a channel."""

    not_decayed = ("freq",)

    def __init__(self, width: int, frequency: float, *, device=None, dtype=None):
        super().__init__()
        self.frequency = frequency
        self.freq = nn.Parameter(torch.empty(1, width, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        nn.init.constant_(self.freq, self.frequency)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(wide(self.freq) * x)


class HyenaFilter(nn.Module):
    """The first taps of filters of `length` taps, generated from where a tap is: (taps) -> [taps, channels]."""

    def __init__(
        self, channels: int, length: int, width: int, emb_dim: int, frequency: float, *, device=None, dtype=None
    ):
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.length, self.bands = length, (emb_dim - 1) // 2
        sine = Sine(width, frequency, **factory)  # one for the three layers
        self.implicit_filter = nn.Sequential(
            Linear(emb_dim, width, **factory), sine,
            Linear(width, width, **factory), sine,
            Linear(width, width, **factory), sine,
            Linear(width, channels, bias=False, **factory),
        )  # fmt: skip
        self.bias = nn.Parameter(torch.empty(channels, **factory))

    def linears(self) -> list[nn.Linear]:
        """The linear layers, in order."""
        return [m for m in self.implicit_filter if isinstance(m, nn.Linear)]

    def reset_parameters(self) -> None:
        for layer in self.implicit_filter:
            layer.reset_parameters()  # type: ignore[operator]
        nn.init.normal_(self.bias)

    def forward(self, taps: int) -> Tensor:
        like = wide(self.bias)
        index = torch.arange(taps, dtype=like.dtype, device=like.device)[:, None]
        time = index / max(self.length - 1, 1)
        band = torch.linspace(1e-4, max(self.bands - 1, 1e-4), self.bands, dtype=like.dtype, device=like.device)
        phase = 2 * math.pi / self.length * index * band
        h = torch.cat([time, phase.cos(), -phase.sin()], -1)
        for layer in self.implicit_filter:  # in fp32 whatever the dtype of the weights
            if isinstance(layer, nn.Linear):
                h = F.linear(h, wide(layer.weight), None if layer.bias is None else wide(layer.bias))
            else:
                h = layer(h)
        delta = torch.linspace(*WINDOW, h.shape[1], dtype=like.dtype, device=like.device)
        return h * (-time * delta).exp()


@register(
    "hyena",
    kind="mixer",
    paper="arXiv:2302.10866",
    ops=("fft_conv", "short_conv"),
    state_growth="constant",
    examples=(
        {"filter_len": 128},
        {"filter_len": 16, "order": 3, "filter_dim": 8, "emb_dim": 5, "frequency": 10.0},
        {"filter_len": 400, "filter_dim": 16, "conv_size": 1},
    ),
)
class Hyena(Block):
    """Hyena: v <- conv(v * x_i; h_i) + b_i (v * x_i) for each of order - 1 long filters h_i, then W_out (v * x_0).

    The order + 1 projections pass a short depthwise convolution. A filter has filter_len taps, in the authors' code the
    longest sequence; here tokens further back than that are not seen. Taps are made by a sine network of width
    filter_dim from their place, its cosines and sines (emb_dim features, odd), times a window that decays at a rate of
    its own a channel. Place and window are constants of filter_len, not trained and not stored.

    x: [B, T, D] -> y: [B, T, D]. Time O(T log T) by Fourier transforms, O(T log^2 T) where documents are packed. There
    is no small state: (order - 1) (filter_len - 1) D past inputs are kept, whatever T is, and a decode step sums over
    all of them and generates the whole filter, O(filter_len D filter_dim).
    At order 2 it is the operator diag(x_0) (Toeplitz(h) + diag(b)) diag(x_1) on v.
    Useful: all of its maps on each token, and of the filter's network on each tap; a filter takes at most 15 log2(T
    + taps) operations a number beside them.
    """

    def __init__(
        self,
        dim: int,
        *,
        order: Annotated[int, Range(ge=2)] = 2,
        filter_len: PositiveInt = 1024,
        filter_dim: PositiveInt = 64,
        emb_dim: Annotated[int, Range(ge=3)] = 3,
        frequency: PositiveFloat = 1.0,
        conv_size: PositiveInt = 3,
        kernel: str = "auto",
        device=None,
        dtype=None,
    ):
        super().__init__(dim)
        check_backend("fft_conv", kernel)
        if emb_dim % 2 == 0:
            raise ValueError(f"emb_dim={emb_dim} must be odd: the place of a tap, and cosine and sine of each band")
        self.order, self.filter_len, self.conv_size, self.kernel = order, filter_len, conv_size, kernel
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_proj = Linear(dim, (order + 1) * dim, **factory)
        self.short_filter = ShortConv((order + 1) * dim, conv_size, bias=True, **factory)
        self.filter_fn = HyenaFilter((order - 1) * dim, filter_len, filter_dim, emb_dim, frequency, **factory)
        self.out_proj = Linear(dim, dim, **factory)

    @torch.no_grad()
    def from_attention(self, q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> tuple[str, ...]:
        """Take values and output. Gates are 1, the short convolutions let a token through, and of each long one only
        the direct part is there at first; queries and keys have no counterpart."""
        if len(v) != self.dim:
            return ()
        self.in_proj.weight.zero_()[-self.dim :] = v
        self.in_proj.bias.fill_(1.0)[-self.dim :] = 0
        pass_through_(self.short_filter)
        self.short_filter.weight[-self.dim :] *= SMALL  # against out_proj, so that its taps learn as fast as maps do
        self.filter_fn.linears()[-1].weight.zero_()
        self.filter_fn.bias.fill_(1.0)
        self.out_proj.weight.copy_(o / SMALL)
        self.out_proj.bias.zero_()
        return "in_proj.weight", "out_proj.weight"

    def reset_parameters(self) -> None:
        for linear in (self.in_proj, self.out_proj):
            init_linear_(linear)
        self.short_filter.reset_parameters()
        self.filter_fn.reset_parameters()

    def forward(
        self,
        x: Tensor,
        *,
        state: HyenaState | None = None,
        positions: Tensor | None = None,
        doc_ids: Tensor | None = None,
    ) -> Tensor:
        refuse_packed_streaming(state, doc_ids)
        narrow, last = short_conv(
            self.in_proj(x),
            self.short_filter.weight[:, 0],
            self.short_filter.bias,
            state=None if state is None else state.conv,
            doc_ids=doc_ids,
        )
        if state is not None:
            state.conv.copy_(handed_on(last))
        gate, *gates, v = narrow.chunk(self.order + 1, -1)
        with no_autocast(x.device):
            filters = self.filter_fn(self._taps(x.shape[1], state is not None)).chunk(self.order - 1, -1)
        biases = wide(self.filter_fn.bias).chunk(self.order - 1)
        for i, (x_i, h, b) in enumerate(zip(reversed(gates), filters, biases, strict=True)):
            u = v * x_i
            past = None if state is None else state.past[:, i]
            v, last = fft_conv(
                u, h, state=None if past is None else previous(past), doc_ids=doc_ids, backend=self.kernel
            )
            v = torch.addcmul(v, b.to(u.dtype), u)
            if past is not None:
                past.copy_(handed_on(last))
        return self.out_proj(v * gate)

    def _taps(self, seq_len: int, streaming: bool) -> int:
        """Taps that any token can use."""
        return self.filter_len if streaming else min(seq_len, self.filter_len)

    def init_state(self, batch_size: int, max_len: int | None = None) -> HyenaState:
        like = self.in_proj.weight
        return HyenaState(
            conv=like.new_zeros(batch_size, self.conv_size - 1, (self.order + 1) * self.dim),
            past=like.new_zeros(batch_size, self.order - 1, self.filter_len - 1, self.dim),
        )

    def state_bytes(self, batch_size: int, max_len: int) -> int:
        conv = (self.conv_size - 1) * (self.order + 1)
        return batch_size * (conv + (self.order - 1) * (self.filter_len - 1)) * self.dim * self.itemsize

    def forward_flops(self, batch_size: int, seq_len: int, context_len: int = 0, streaming: bool = False) -> int:
        taps = self._taps(seq_len, streaming)
        return (
            linear_flops(batch_size * seq_len, self.in_proj, self.out_proj)
            + linear_flops(taps, *self.filter_fn.linears())
            + fft_conv_flops(batch_size, seq_len, (self.order - 1) * self.dim, taps)
        )

    def vector_flops(self, batch_size: int, seq_len: int, context_len: int = 0) -> int:
        taps = min(self.filter_len, context_len + seq_len)
        # directly, or by Fourier transforms: about 15 log2 operations a number
        conv = min(2 * taps, math.ceil(15 * math.log2(seq_len + taps)))
        short = 2 * self.conv_size * (self.order + 1)
        return batch_size * seq_len * self.dim * (short + (self.order - 1) * (1 + conv + 2) + 1)

    def activation_elements(self, batch_size: int, seq_len: int) -> int:
        taps, longs = min(seq_len, self.filter_len), self.order - 1
        # x, in_proj, short convolution, v * x_0; for each long one v * x_i twice
        token = self.dim * (2 + 2 * (self.order + 1) + 2 * longs)
        # of each long one and of its filter, what goes into a transform and what comes out
        circle = 2 * transform_length(seq_len + taps - 1) * longs * self.dim
        layers = taps * (longs * self.dim + 9 * self.filter_fn.linears()[0].out_features)
        return batch_size * (seq_len * token + circle) + circle + layers

    def parallel_plan(self) -> ParallelPlan:
        return ParallelPlan(
            context="gather_input",
            reason="in_proj stacks the gates and v, and one network makes the taps of all channels",
        )
