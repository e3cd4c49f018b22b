"""Gated short convolution, the local mixer of LFM2. Liquid AI 2025, arXiv:2511.23404.

With * elementwise and a causal depthwise convolution of a few taps:
    [B; C; u] = W_in x;  y = W_out (C * conv(B * u))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from zoo.blocks.recurrent import ShortConv
from zoo.contract import Block, ParallelPlan, State, init_linear_, linear_flops, refuse_packed_streaming
from zoo.kernels.dispatch import check_backend
from zoo.kernels.linear import Linear
from zoo.kernels.short_conv import short_conv
from zoo.registry import register
from zoo.schema import PositiveInt
from zoo.segments import handed_on


@dataclass
class GatedConvState(State):
    """conv: [B, W-1, D], the newest inputs of the convolution."""

    conv: Tensor


@register(
    "gated_conv",
    kind="mixer",
    paper="arXiv:2511.23404",
    ops=("short_conv",),
    state_growth="constant",
    examples=({}, {"conv_size": 4, "bias": True}),
)
class GatedConv(Block):
    """Gated short convolution: y = W_out (C * conv(B * u)), [B; C; u] = W_in x.

    x: [B, T, D] -> y: [B, T, D]; rows of in_proj are [B; C; u], the convolution has conv_size = W taps for each
    channel and no activation. Useful: all 8 D^2 FLOPs a token, of its maps. O(T), state (W - 1) D numbers. A token
    sees the W - 1 before it and nothing else, so a model of such layers alone reaches as far as all their windows
    together.
    With one tap it is y = W_out (w * B * C * u), a third-order polynomial of the token alone.
    Parameters and layouts are those of Lfm2ShortConv in Hugging Face.
    """

    scans = False

    def __init__(
        self,
        dim: int,
        *,
        conv_size: PositiveInt = 3,
        bias: bool = False,
        kernel: str = "auto",
        device=None,
        dtype=None,
    ):
        super().__init__(dim)
        check_backend("short_conv", kernel)
        self.conv_size, self.kernel = conv_size, kernel
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_proj = Linear(dim, 3 * dim, bias=bias, **factory)
        self.conv = ShortConv(dim, conv_size, bias=bias, **factory)
        self.out_proj = Linear(dim, dim, bias=bias, **factory)

    def reset_parameters(self) -> None:
        init_linear_(self.in_proj)
        self.conv.reset_parameters()
        init_linear_(self.out_proj)

    def forward(
        self,
        x: Tensor,
        *,
        state: GatedConvState | None = None,
        positions: Tensor | None = None,
        doc_ids: Tensor | None = None,
    ) -> Tensor:
        refuse_packed_streaming(state, doc_ids)
        before, after, u = self.in_proj(x).chunk(3, -1)
        carried = None if state is None else state.conv
        y, newest = short_conv(
            before * u, self.conv.weight[:, 0], self.conv.bias, state=carried, doc_ids=doc_ids, backend=self.kernel
        )
        if state is not None:
            state.conv.copy_(handed_on(newest))
        return self.out_proj(after * y)

    def init_state(self, batch_size: int, max_len: int | None = None) -> GatedConvState:
        return GatedConvState(self.in_proj.weight.new_zeros(batch_size, self.conv_size - 1, self.dim))

    def state_bytes(self, batch_size: int, max_len: int) -> int:
        return batch_size * (self.conv_size - 1) * self.dim * self.itemsize

    def forward_flops(self, batch_size: int, seq_len: int, context_len: int = 0, streaming: bool = False) -> int:
        return linear_flops(batch_size * seq_len, self.in_proj, self.out_proj)

    def vector_flops(self, batch_size: int, seq_len: int, context_len: int = 0) -> int:
        return batch_size * seq_len * self.dim * (2 * self.conv_size + 2)  # taps, two gates

    def activation_elements(self, batch_size: int, seq_len: int) -> int:
        # x; B, C and u; B * u and what the convolution makes of it; C times that
        return batch_size * seq_len * 7 * self.dim

    def parallel_plan(self) -> ParallelPlan:
        return ParallelPlan(context="pass_state", reason="in_proj stacks B, C and u, so rows are not split as they lie")
