"""The recurrent block of Griffin and RecurrentGemma. De et al. 2024, arXiv:2402.19427.

With * elementwise and block-diagonal W_i, W_r:
    u = conv(W_x x + b_x);  i = sigmoid(W_i u + b_i);  r = sigmoid(W_r u + b_r)
    a_t = exp(-8 r_t softplus(L));  h_t = a_t * h_{t-1} + sqrt(1 - a_t^2) * i_t * u_t   (the root is 1 at t = 0)
    output = W_out (h * gelu(W_y x + b_y)) + b_out
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.blocks.grafting import OPEN_GELU, inverse_softplus, memories, pass_through_, take
from zoo.blocks.kv_cache import segment_index
from zoo.blocks.recurrent import ShortConv, default_heads, previous, wide
from zoo.contract import (
    Block,
    ParallelPlan,
    State,
    init_linear_,
    linear_flops,
    positions_from,
    refuse_packed_streaming,
    state_dtype,
)
from zoo.kernels import work
from zoo.kernels.diagonal_scan import diagonal_scan
from zoo.kernels.dispatch import check_backend
from zoo.kernels.linear import Linear
from zoo.kernels.short_conv import short_conv
from zoo.registry import register
from zoo.schema import PositiveInt
from zoo.segments import handed_on

SHARPNESS = 8.0  # the paper's c


@dataclass
class RGLRUState(State):
    """conv: [B, W-1, C], the newest inputs of the convolution; h: [B, C]; length: [B] int64, tokens seen."""

    conv: Tensor
    h: Tensor
    length: Tensor


class RGLRU(nn.Module):
    """Parameters of the real-gated linear recurrent unit, gate weights [heads, in, out] as in transformers."""

    not_decayed = ("input_gate_bias", "recurrent_gate_bias")
    matrices = ("input_gate_weight", "recurrent_gate_weight")

    def __init__(self, width: int, num_heads: int, *, device=None, dtype=None):
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        block = width // num_heads
        self.recurrent_param = nn.Parameter(torch.empty(width, **factory))
        self.input_gate_weight = nn.Parameter(torch.empty(num_heads, block, block, **factory))
        self.input_gate_bias = nn.Parameter(torch.empty(num_heads, block, **factory))
        self.recurrent_gate_weight = nn.Parameter(torch.empty(num_heads, block, block, **factory))
        self.recurrent_gate_bias = nn.Parameter(torch.empty(num_heads, block, **factory))

    def reset_parameters(self) -> None:
        """exp(-softplus(L)) uniform over the area of the ring [0.9, 0.999]; gate weights of std 1 / sqrt(in)."""
        for weight in (self.input_gate_weight, self.recurrent_gate_weight):
            std = weight.shape[1] ** -0.5
            nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std)
        for bias in (self.input_gate_bias, self.recurrent_gate_bias):
            nn.init.zeros_(bias)
        with torch.no_grad():
            # not in the dtype of the parameter: bf16 would round to 1
            square = torch.empty_like(self.recurrent_param, dtype=state_dtype(self.recurrent_param.dtype))
            self.recurrent_param.copy_(torch.expm1(-0.5 * square.uniform_(0.9**2, 0.999**2).log()).log())

    def start_(self) -> Tensor:
        """Both gates 1/2, memories from short to long over the channels of a block; returns the factor with which a
        constant u comes out as it went in."""
        for p in (self.input_gate_weight, self.recurrent_gate_weight, self.input_gate_bias, self.recurrent_gate_bias):
            p.zero_()
        heads, block = self.input_gate_bias.shape
        rate = (1 / memories(block, self.recurrent_param)).repeat(heads)
        self.recurrent_param.copy_(inverse_softplus(2 * rate / SHARPNESS))
        a = (-rate).exp()
        return 2 * ((1 - a) / (1 + a)).sqrt()

    def forward(self, u: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
        """log a and what is added to the state, in fp32 (fp64). u: [B, T, C]; first: [B, T], where a sequence begins:
        there a = 0."""
        blocks = u.reshape(-1, *self.input_gate_bias.shape).transpose(0, 1)
        i = torch.baddbmm(self.input_gate_bias[:, None], blocks, self.input_gate_weight)
        r = torch.baddbmm(self.recurrent_gate_bias[:, None], blocks, self.recurrent_gate_weight)
        i, r = (wide(gate.transpose(0, 1).reshape(u.shape)).sigmoid() for gate in (i, r))
        log_a = r * (-SHARPNESS * F.softplus(wide(self.recurrent_param)))
        log_a = log_a.masked_fill(first[..., None], -torch.inf)
        # 1 - a^2 without cancellation; the floor keeps the root's gradient finite where a rounds to 1
        left = -torch.expm1(2 * log_a)
        return log_a, left.clamp(min=torch.finfo(left.dtype).tiny).sqrt() * i * wide(u)


@register(
    "rg_lru",
    kind="mixer",
    paper="arXiv:2402.19427",
    ops=("diagonal_scan", "short_conv"),
    state_growth="constant",
    examples=({}, {"lru_width": 96, "num_heads": 3, "conv_size": 2}),
)
class RecurrentBlock(Block):
    """Griffin's recurrent block: h_t = a_t * h_{t-1} + sqrt(1 - a_t^2) * i_t * u_t, y = W_out (h * gelu(W_y x)).

    u: a short convolution of W_x x; a_t = exp(-8 r_t softplus(L)); gates i, r = sigmoid of block-diagonal maps of u,
    `num_heads` blocks. The first token of a sequence is written with weight i_t alone. C = lru_width (default D).
    x: [B, T, D] -> y: [B, T, D]; 3 D C + 2 C^2 / heads parameters and some vectors, O(T) time, C (W + 1) numbers
    of state and a count. Parameters as in transformers' RecurrentGemmaRecurrentBlock.
    With r = 0 the state keeps the first token forever; as L grows it forgets at once, and the block is a gated
    convolution.
    Useful: all products of the layers; the state takes 2 C operations a token beside them.
    """

    scans = False

    def __init__(
        self,
        dim: int,
        *,
        lru_width: PositiveInt | None = None,
        num_heads: PositiveInt | None = None,
        conv_size: PositiveInt = 4,
        kernel: str = "auto",
        device=None,
        dtype=None,
    ):
        super().__init__(dim)
        check_backend("diagonal_scan", kernel)
        self.width, self.conv_size, self.kernel = lru_width or dim, conv_size, kernel
        self.num_heads = num_heads or default_heads(self.width, 256)
        if self.width % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} must divide lru_width={self.width}")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.linear_y = Linear(dim, self.width, **factory)
        self.linear_x = Linear(dim, self.width, **factory)
        self.conv_1d = ShortConv(self.width, conv_size, bias=True, **factory)
        self.rg_lru = RGLRU(self.width, self.num_heads, **factory)
        self.linear_out = Linear(self.width, dim, **factory)

    @staticmethod
    def like_attention(dim: int, num_heads: int, num_kv_heads: int, head_dim: int) -> dict[str, Any]:
        """A channel for each channel of the values."""
        return {"lru_width": num_heads * head_dim}

    @torch.no_grad()
    def from_attention(self, q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> tuple[str, ...]:
        """Take the values as what is written and the output, for which a channel is a decaying mean; queries and keys
        have no counterpart. The gate is open."""
        factor = self.rg_lru.start_()
        self.linear_y.weight.zero_()
        self.linear_y.bias.fill_(OPEN_GELU)
        self.linear_x.bias.zero_()
        pass_through_(self.conv_1d)
        if len(v) != self.width:
            return ()
        return take(
            ("linear_x.weight", self.linear_x.weight, v), ("linear_out.weight", self.linear_out.weight, factor * o)
        )

    def reset_parameters(self) -> None:
        for linear in (self.linear_y, self.linear_x, self.linear_out):
            init_linear_(linear)
        self.conv_1d.reset_parameters()
        self.rg_lru.reset_parameters()

    def forward(
        self,
        x: Tensor,
        *,
        state: RGLRUState | None = None,
        positions: Tensor | None = None,
        doc_ids: Tensor | None = None,
    ) -> Tensor:
        refuse_packed_streaming(state, doc_ids)
        h = self._recur(self.linear_x(x), state, doc_ids)
        return self.linear_out(h.to(x.dtype) * F.gelu(self.linear_y(x), approximate="tanh"))

    def _recur(self, u: Tensor, state: RGLRUState | None, doc_ids: Tensor | None) -> Tensor:
        """h [B, T, C] from u before its convolution."""
        B, T, _ = u.shape
        order = positions_from(doc_ids, B, T, u.device) if state is None else segment_index(state.length, T)
        carried = None if state is None else state.conv
        u, newest = short_conv(u, self.conv_1d.weight[:, 0], self.conv_1d.bias, state=carried, doc_ids=doc_ids)
        before = None if state is None else previous(state.h)
        log_a, written = self.rg_lru(u, order == 0)  # a = 0 parts the documents
        h, last = diagonal_scan(log_a, written, initial_state=before, backend=self.kernel)
        if state is not None:
            state.conv.copy_(handed_on(newest))
            state.h.copy_(handed_on(last))
            state.length.add_(T)
        return h

    def init_state(self, batch_size: int, max_len: int | None = None) -> RGLRUState:
        like = self.linear_x.weight
        return RGLRUState(
            conv=like.new_zeros(batch_size, self.conv_size - 1, self.width),
            h=like.new_zeros(batch_size, self.width, dtype=state_dtype(like.dtype)),
            length=like.new_zeros(batch_size, dtype=torch.int64),
        )

    def state_bytes(self, batch_size: int, max_len: int) -> int:
        h = state_dtype(self.linear_x.weight.dtype).itemsize
        return batch_size * (self.width * (h + (self.conv_size - 1) * self.itemsize) + 8)

    def forward_flops(self, batch_size: int, seq_len: int, context_len: int = 0, streaming: bool = False) -> int:
        tokens = batch_size * seq_len
        gates = 2 * 2 * tokens * self.width * (self.width // self.num_heads)
        return gates + linear_flops(tokens, self.linear_y, self.linear_x, self.linear_out)

    def vector_flops(self, batch_size: int, seq_len: int, context_len: int = 0) -> int:
        # taps; two gates; log a, a, sqrt(1 - a^2), times i u, the update; gelu and the product
        channel = 2 * self.conv_size + 2 * work.SIGMOID + 1 + 1 + 3 + 2 + 2 + work.GELU + 1
        return batch_size * seq_len * self.width * channel

    def product_elements(self, batch_size: int, seq_len: int) -> int:
        return super().product_elements(batch_size, seq_len) + 2 * batch_size * seq_len * self.width  # the gates

    def activation_elements(self, batch_size: int, seq_len: int) -> int:
        # x; W_y x and its gelu; u before and after the convolution; gates; 1 - a^2 twice, its root, root * i; a, h; h *
        # gelu
        return batch_size * seq_len * (self.dim + 13 * self.width)

    def parallel_plan(self) -> ParallelPlan:
        column = dict.fromkeys(("linear_y", "linear_x", "conv_1d", "rg_lru"), "column")
        return ParallelPlan(column | {"linear_out": "row"}, units=self.num_heads, context="pass_state")
