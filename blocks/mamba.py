"""Mamba, the selective state space model S6. Gu & Dao 2023, arXiv:2312.00752; with normed dt, B, C as in Jamba
(arXiv:2403.19887).

With E = expand D channels of N states each and * elementwise:
    [x; z] = W_in input;  u = silu(conv(x));  [r; B; C] = W_x u;  delta = softplus(W_dt r + b_dt)
    h_t = exp(delta_t A) * h_{t-1} + (delta_t u_t) B_t,  A = -exp(A_log);  y_t = h_t C_t + D * u_t
    output = W_out (y * silu(z))
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.blocks.grafting import OPEN_SILU, SMALL, pass_through_, take
from zoo.blocks.norms import RMSNorm
from zoo.blocks.recurrent import ShortConv, previous, wide
from zoo.contract import Block, ParallelPlan, State, init_linear_, linear_flops, refuse_packed_streaming, state_dtype
from zoo.kernels import work
from zoo.kernels.dispatch import check_backend
from zoo.kernels.linear import Linear, linear
from zoo.kernels.selective_scan import INTERVAL, selective_scan
from zoo.kernels.selective_scan import flops as selective_scan_flops
from zoo.registry import register
from zoo.schema import PositiveFloat, PositiveInt
from zoo.segments import handed_on


@dataclass
class MambaState(State):
    """conv: [B, W-1, C], the newest inputs of the convolution; ssm: the recurrent state."""

    conv: Tensor
    ssm: Tensor


@register(
    "mamba",
    kind="mixer",
    paper="arXiv:2312.00752",
    ops=("selective_scan", "short_conv"),
    state_growth="constant",
    examples=(
        {},
        {"state_dim": 4, "expand": 1, "conv_size": 2, "dt_rank": 8, "bcdt_norm": True},
        {"state_dim": 4, "expand": 1, "bias": True, "conv_bias": False},
    ),
)
class Mamba(Block):
    """Mamba: h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t, y_t = C_t h_t + D u_t, with delta, B, C read from u.

    x: [B, T, D] -> y: [B, T, D]; rows of in_proj are [x; z], of x_proj [dt; B; C]. The recurrence is elementwise
    on E N numbers a token; its backward keeps a state every 64 tokens and is O(T). State: E (N + W - 1) numbers.
    bcdt_norm: RMS norms of dt, B and C (Jamba; with weights of one, Falcon-Mamba), with norm_eps. bias: of in_proj and
    out_proj; conv_bias: of the convolution.
    As delta -> 0 it is the gated convolution D * u; with A shared over N and delta over a head it is Mamba-2;
    with constant delta, B, C a fixed convolution.
    Useful: 2 E N FLOPs a token to read the states and 5 E N operations to make them.
    """

    not_decayed = ("A_log",)

    def __init__(
        self,
        dim: int,
        *,
        state_dim: PositiveInt = 16,
        expand: PositiveInt = 2,
        conv_size: PositiveInt = 4,
        dt_rank: PositiveInt | None = None,
        bcdt_norm: bool = False,
        norm_eps: PositiveFloat = 1e-6,
        bias: bool = False,
        conv_bias: bool = True,
        kernel: str = "auto",
        device=None,
        dtype=None,
    ):
        super().__init__(dim)
        check_backend("selective_scan", kernel)
        self.inner, self.state_dim, self.conv_size, self.kernel = expand * dim, state_dim, conv_size, kernel
        self.dt_rank = dt_rank or -(-dim // 16)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_proj = Linear(dim, 2 * self.inner, bias=bias, **factory)
        self.conv1d = ShortConv(self.inner, conv_size, bias=conv_bias, **factory)
        self.x_proj = Linear(self.inner, self.dt_rank + 2 * state_dim, bias=False, **factory)
        self.dt_proj = Linear(self.dt_rank, self.inner, **factory)
        self.A_log = nn.Parameter(torch.empty(self.inner, state_dim, **factory))
        self.D = nn.Parameter(torch.empty(self.inner, **factory))
        self.out_proj = Linear(self.inner, dim, bias=bias, **factory)
        self.dt_layernorm = RMSNorm(self.dt_rank, eps=norm_eps, **factory) if bcdt_norm else None
        self.b_layernorm = RMSNorm(state_dim, eps=norm_eps, **factory) if bcdt_norm else None
        self.c_layernorm = RMSNorm(state_dim, eps=norm_eps, **factory) if bcdt_norm else None

    @staticmethod
    def like_attention(dim: int, num_heads: int, num_kv_heads: int, head_dim: int) -> dict[str, Any]:
        """A channel for each channel of the values, where their number is a multiple of dim. With a bias the gate can
        be open whatever x is."""
        inner = num_heads * head_dim
        return {"bias": True} | ({"expand": inner // dim} if inner % dim == 0 else {})

    @torch.no_grad()
    def from_attention(self, q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> tuple[str, ...]:
        """Take x from the values, and the output, before which only the skip D is large. What the convolution lets
        through is small, where SiLU is linear; the gate is open. B and C, which all channels share and which are made
        of x alone, stay as they are drawn."""
        x, z = self.in_proj.weight.chunk(2)
        pass_through_(self.conv1d, SMALL)
        if self.in_proj.bias is not None:
            z.zero_()
            self.in_proj.bias.zero_()[self.inner :] = OPEN_SILU
            self.out_proj.bias.zero_()
        return take(("in_proj.weight", x, v), ("out_proj.weight", self.out_proj.weight, 2 / SMALL * o))  # SiLU halves

    def reset_parameters(self) -> None:
        for layer in (self.in_proj, self.x_proj, self.out_proj):
            init_linear_(layer)
        for module in (self.conv1d, self.dt_layernorm, self.b_layernorm, self.c_layernorm):
            if module is not None:
                module.reset_parameters()
        nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        nn.init.uniform_(self.dt_proj.bias, math.log(1e-3), math.log(1e-1))
        nn.init.ones_(self.D)
        with torch.no_grad():
            step = self.dt_proj.bias.exp()
            self.dt_proj.bias.copy_(step + torch.log(-torch.expm1(-step)))  # inverse of softplus
            self.A_log.copy_(torch.arange(1, self.state_dim + 1, device=self.A_log.device).log())

    def forward(
        self,
        x: Tensor,
        *,
        state: MambaState | None = None,
        positions: Tensor | None = None,
        doc_ids: Tensor | None = None,
    ) -> Tensor:
        refuse_packed_streaming(state, doc_ids)
        x, z = self.in_proj(x).chunk(2, -1)
        u = self.conv1d(x, None if state is None else state.conv, doc_ids)
        dt, B, C = self.x_proj(u).split([self.dt_rank, self.state_dim, self.state_dim], -1)
        if self.dt_layernorm and self.b_layernorm and self.c_layernorm:
            dt, B, C = self.dt_layernorm(dt), self.b_layernorm(B), self.c_layernorm(C)
        y, ssm = selective_scan(
            u,
            F.softplus(wide(linear(dt, self.dt_proj.weight)) + wide(self.dt_proj.bias)),
            -wide(self.A_log).exp(),
            B,
            C,
            wide(self.D),
            initial_state=None if state is None else previous(state.ssm),
            doc_ids=doc_ids,
            backend=self.kernel,
        )
        if state is not None:
            state.ssm.copy_(handed_on(ssm))
        return self.out_proj(y * F.silu(z))

    def init_state(self, batch_size: int, max_len: int | None = None) -> MambaState:
        like = self.in_proj.weight
        return MambaState(
            like.new_zeros(batch_size, self.conv_size - 1, self.inner),
            like.new_zeros(batch_size, self.inner, self.state_dim, dtype=state_dtype(like.dtype)),
        )

    def state_bytes(self, batch_size: int, max_len: int) -> int:
        ssm = self.state_dim * state_dtype(self.in_proj.weight.dtype).itemsize
        return batch_size * self.inner * (ssm + (self.conv_size - 1) * self.itemsize)

    def forward_flops(self, batch_size: int, seq_len: int, context_len: int = 0, streaming: bool = False) -> int:
        linears = linear_flops(batch_size * seq_len, self.in_proj, self.x_proj, self.dt_proj, self.out_proj)
        return linears + selective_scan_flops(batch_size, seq_len, self.inner, self.state_dim)

    def vector_flops(self, batch_size: int, seq_len: int, context_len: int = 0) -> int:
        # taps and silu; softplus; exp(delta A), delta u B and the update of each state; delta u, D u, the gate
        channel = 2 * self.conv_size + work.SILU + 1 + 5 * self.state_dim + 1 + 2 + work.SILU + 1
        norms = work.RMS * (self.dt_rank + 2 * self.state_dim) if self.dt_layernorm else 0
        return batch_size * seq_len * (self.inner * channel + norms)

    def activation_elements(self, batch_size: int, seq_len: int) -> int:
        # x; x, z; x alone, u; dt, B, C; step before and after softplus; y, silu(z), their product; a state for
        # each interval
        row = self.dim + 9 * self.inner + 3 * self.dt_rank + 4 * self.state_dim
        return batch_size * (seq_len * row + -(-seq_len // INTERVAL) * self.inner * self.state_dim)

    def parallel_plan(self) -> ParallelPlan:
        return ParallelPlan(
            context="pass_state",
            reason="in_proj stacks x and z, and x_proj sums over all channels, so rows are not split as they lie",
        )
