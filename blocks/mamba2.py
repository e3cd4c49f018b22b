"""Mamba-2, state space duality. Dao & Gu 2024, arXiv:2405.21060.

With E = expand D channels in H heads of P, N states and * elementwise:
    [z; x; B; C; dt] = W_in input;  [x; B; C] = silu(conv([x; B; C]));  delta = softplus(dt + dt_bias)
    S_t = exp(delta_t A) S_{t-1} + B_t (delta_t x_t)^T,  A = -exp(A_log) per head;  y_t = S_t^T C_t + D x_t
    output = W_out RMSNorm(y * silu(z))
The core is linear attention with q = C, k = B, v = delta x and log-decay delta A.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.blocks.grafting import OPEN_SILU, SMALL, inverse_softplus, memories, pass_through_, take, value_scale
from zoo.blocks.mamba import MambaState
from zoo.blocks.recurrent import ShortConv, previous, reset_softplus_decay_, wide
from zoo.contract import Block, ParallelPlan, init_linear_, linear_flops, refuse_packed_streaming, state_dtype
from zoo.kernels import work
from zoo.kernels.dispatch import check_backend
from zoo.kernels.linear import Linear
from zoo.kernels.linear_attention import INTERVAL, linear_attention
from zoo.kernels.linear_attention import flops as linear_attention_flops
from zoo.registry import register
from zoo.schema import PositiveFloat, PositiveInt
from zoo.segments import handed_on


class GatedGroupNorm(nn.Module):
    """RMS norm of y * silu(z) over each of `groups` equal groups of channels, times a weight per channel."""

    def __init__(self, width: int, groups: int, *, eps: float, device=None, dtype=None):
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.empty(width, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        grouped = (wide(y) * F.silu(wide(z))).unflatten(-1, (self.groups, -1))
        length = torch.linalg.vector_norm(grouped, dim=-1, keepdim=True)  # no tensor of squares
        scale = torch.rsqrt(length.square() / grouped.shape[-1] + self.eps)
        return ((grouped * scale).flatten(-2) * wide(self.weight)).to(z.dtype)


@register(
    "mamba2",
    kind="mixer",
    paper="arXiv:2405.21060",
    ops=("linear_attention", "short_conv"),
    state_growth="constant",
    relations=(
        "mamba2(chunk_size=16) == mamba2(chunk_size=64)",
        "mamba2(multipliers=[1.0, 1.0, 1.0, 1.0, 1.0]) == mamba2()",
        "mamba2(expand=1, head_dim=16, state_dim=16, gated_norm=False) == mamba(expand=1, state_dim=16) at "
        "in_proj.weight[:64]=in_proj.weight[64:], in_proj.weight[64:128]=in_proj.weight[:64], "
        "in_proj.weight[128:160]=in_proj.weight[:32], in_proj.weight[160:]=0, "
        "conv1d.weight[:64]=conv1d.weight, conv1d.weight[64:]=conv1d.weight[:32], "
        "conv1d.bias[:64]=conv1d.bias, conv1d.bias[64:]=conv1d.bias[:32], x_proj.weight=0, "
        "x_proj.weight[4:36, :32]=eye, dt_proj.weight=0, dt_proj.bias=-1, dt_bias=-1, A_log=0.5, D=0.7",
    ),
    examples=(
        {"state_dim": 16, "chunk_size": 16},
        {"num_heads": 4, "num_groups": 2, "state_dim": 8, "chunk_size": 16, "time_step_limit": [0.01, 0.5]},
        {"head_dim": 8, "expand": 1, "conv_size": 2, "state_dim": 16, "chunk_size": 16},
        {"expand": 1, "state_dim": 8, "chunk_size": 16, "bias": True, "conv_bias": False},
        {
            "expand": 1.5,
            "num_heads": 4,
            "state_dim": 8,
            "chunk_size": 16,
            "gated_norm": False,
            "multipliers": [0.5, 0.4, 0.3, 0.7, 0.6],
        },
    ),
)
class Mamba2(Block):
    """Mamba-2: S_t = exp(delta_t A_h) S_{t-1} + B_t (delta_t x_t)^T, y_t = S_t^T C_t + D_h x_t, gated and normed.

    x: [B, T, D] -> y: [B, T, D]; rows of in_proj are [z; x; B; C; dt], B and C are shared by the heads of a group;
    delta is clamped to time_step_limit where given, in every mode. Time O(T), as matrix products in chunks; state
    E N + (E + 2 G N)(W - 1) numbers, the recurrent part as [B, H, N, P] (transposed against other codes).
    expand * D = num_heads * head_dim; of the two, one follows from the other, and head_dim is 64 where both are
    left out (less where 64 does not divide expand * D). chunk_size changes speed only. bias: of in_proj and out_proj;
    conv_bias: of the convolution. As in Falcon-H1,
    `multipliers` scale z, x, B, C and dt as in_proj gives them, and gated_norm=False leaves y * silu(z) without a norm.
    As delta -> 0 it is the skip D x; it is Mamba with A shared over the states and delta over a head.
    Useful: 4 E N FLOPs a token for the state, and E N products with the decay.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: PositiveInt | None = None,
        head_dim: PositiveInt | None = None,
        state_dim: PositiveInt = 128,
        num_groups: PositiveInt = 1,
        expand: PositiveFloat = 2,
        conv_size: PositiveInt = 4,
        time_step_limit: tuple[float, float] | None = None,
        multipliers: tuple[float, float, float, float, float] | None = None,
        gated_norm: bool = True,
        norm_eps: PositiveFloat = 1e-5,
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: PositiveInt = 64,
        kernel: str = "auto",
        device=None,
        dtype=None,
    ):
        super().__init__(dim)
        check_backend("linear_attention", kernel)
        self.inner, self.state_dim, self.num_groups = round(expand * dim), state_dim, num_groups
        if not math.isclose(self.inner, expand * dim):
            raise ValueError(f"expand={expand} times dim={dim} is no whole number of channels")
        self.num_heads, self.head_dim = _heads(self.inner, num_heads, head_dim)
        if self.num_heads % num_groups:
            raise ValueError(f"num_groups={num_groups} must divide the number of heads, {self.num_heads}")
        if time_step_limit is not None and not (
            len(time_step_limit) == 2 and 0 <= time_step_limit[0] < time_step_limit[1]
        ):
            raise ValueError(f"time_step_limit must be [low, high] with 0 <= low < high, got {list(time_step_limit)}")
        self.time_step_limit = None if time_step_limit is None else tuple(time_step_limit)
        if multipliers is not None and len(multipliers) != 5:
            raise ValueError(f"multipliers are five numbers, of z, x, B, C and dt, got {list(multipliers)}")
        self.multipliers = multipliers
        self.conv_size, self.chunk_size, self.kernel = conv_size, chunk_size, kernel
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv_channels = self.inner + 2 * num_groups * state_dim
        self.in_proj = Linear(dim, self.inner + self.conv_channels + self.num_heads, bias=bias, **factory)
        self.conv1d = ShortConv(self.conv_channels, conv_size, bias=conv_bias, **factory)
        self.dt_bias = nn.Parameter(torch.empty(self.num_heads, **factory))
        self.A_log = nn.Parameter(torch.empty(self.num_heads, **factory))
        self.D = nn.Parameter(torch.empty(self.num_heads, **factory))
        self.norm = GatedGroupNorm(self.inner, num_groups, eps=norm_eps, **factory) if gated_norm else None
        self.out_proj = Linear(self.inner, dim, bias=bias, **factory)

    @staticmethod
    def like_attention(dim: int, num_heads: int, num_kv_heads: int, head_dim: int) -> dict[str, Any]:
        """Options with which a head's state is its keys times its values (Mamba in the Llama, arXiv:2408.15237). With a
        bias the gate can be open whatever x is."""
        inner = {"num_heads": num_heads, "head_dim": head_dim, "expand": num_heads * head_dim / dim}
        return inner | {"state_dim": head_dim, "num_groups": num_heads, "bias": True}

    @torch.no_grad()
    def from_attention(self, q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> tuple[str, ...]:
        """Take C from the queries, B from the keys, x from the values, each with the rows of all heads. What the
        convolution lets through is small, where SiLU is linear; steps are 1 and there is no skip; the gate is open."""
        widths = [self.inner, self.inner, *[self.num_groups * self.state_dim] * 2, self.num_heads]
        z, x, B, C, dt = self.in_proj.weight.split(widths)
        taken = take(
            ("in_proj.weight", x, v), ("in_proj.weight", B, k), ("in_proj.weight", C, q),
            ("out_proj.weight", self.out_proj.weight, o),
        )  # fmt: skip
        dt.zero_()
        self.dt_bias.fill_(inverse_softplus(torch.ones(())))
        self.A_log.copy_(-memories(self.num_heads, self.A_log).log())
        self.D.zero_()
        pass_through_(self.conv1d, SMALL)
        if self.in_proj.bias is not None:
            z.zero_()
            self.in_proj.bias.zero_()[: self.inner] = OPEN_SILU
            self.out_proj.bias.zero_()
        if self.norm is not None and len(v) == self.inner:
            self.norm.weight.copy_(value_scale(v, self.inner))
        return taken

    def reset_parameters(self) -> None:
        for linear in (self.in_proj, self.out_proj):
            init_linear_(linear)
        for module in (self.conv1d, self.norm):
            if module is not None:
                module.reset_parameters()
        reset_softplus_decay_(self.A_log, self.dt_bias, 1.0, 16.0)
        nn.init.ones_(self.D)

    def forward(
        self,
        x: Tensor,
        *,
        state: MambaState | None = None,
        positions: Tensor | None = None,
        doc_ids: Tensor | None = None,
    ) -> Tensor:
        refuse_packed_streaming(state, doc_ids)
        states = self.num_groups * self.state_dim
        projected = self.in_proj(x)
        if self.multipliers is not None:
            parts = projected.split([self.inner, self.inner, states, states, self.num_heads], -1)
            projected = torch.cat([m * part for m, part in zip(self.multipliers, parts, strict=True)], -1)
        z, xBC, dt = projected.split([self.inner, self.conv_channels, self.num_heads], -1)
        xBC = self.conv1d(xBC, None if state is None else state.conv, doc_ids)
        u, B, C = xBC.split([self.inner, states, states], -1)
        u = wide(u).unflatten(-1, (self.num_heads, self.head_dim))
        B, C = (t.unflatten(-1, (self.num_groups, self.state_dim)) for t in (B, C))
        delta = F.softplus(wide(dt) + wide(self.dt_bias))
        if self.time_step_limit is not None:
            delta = delta.clamp(*self.time_step_limit)
        y, ssm = linear_attention(
            C,
            B,
            delta[..., None] * u,
            -wide(self.A_log).exp() * delta,
            initial_state=None if state is None else previous(state.ssm),
            doc_ids=doc_ids,
            chunk_size=self.chunk_size,
            backend=self.kernel,
        )
        if state is not None:
            state.ssm.copy_(handed_on(ssm))
        y = torch.addcmul(y, wide(self.D)[:, None], u)
        y = y.flatten(-2)
        return self.out_proj((y * F.silu(wide(z))).to(z.dtype) if self.norm is None else self.norm(y, z))

    def init_state(self, batch_size: int, max_len: int | None = None) -> MambaState:
        like, shape = self.in_proj.weight, (batch_size, self.num_heads, self.state_dim, self.head_dim)
        return MambaState(
            like.new_zeros(batch_size, self.conv_size - 1, self.conv_channels),
            like.new_zeros(shape, dtype=state_dtype(like.dtype)),
        )

    def state_bytes(self, batch_size: int, max_len: int) -> int:
        ssm = self.inner * self.state_dim * state_dtype(self.in_proj.weight.dtype).itemsize
        return batch_size * (ssm + (self.conv_size - 1) * self.conv_channels * self.itemsize)

    def forward_flops(self, batch_size: int, seq_len: int, context_len: int = 0, streaming: bool = False) -> int:
        return linear_flops(batch_size * seq_len, self.in_proj, self.out_proj) + linear_attention_flops(
            batch_size,
            seq_len,
            self.num_heads,
            self.state_dim,
            self.head_dim,
            num_groups=self.num_groups,
            chunk_size=self.chunk_size,
        )

    def useful_flops(self, batch_size: int, seq_len: int, context_len: int = 0) -> int:
        tokens = batch_size * seq_len
        state = work.recurrence(work.LINEAR, tokens, self.num_heads, self.state_dim, self.head_dim)
        return linear_flops(tokens, self.in_proj, self.out_proj) + state

    def vector_flops(self, batch_size: int, seq_len: int, context_len: int = 0) -> int:
        # delta x, the decay of the state, D x, the gate and its norm
        inner = 1 + self.state_dim + 2 + work.SILU + 1 + (0 if self.norm is None else work.RMS)
        step = 3 + (self.time_step_limit is not None)  # softplus, times A, exponential
        scaled = 0 if self.multipliers is None else self.in_proj.out_features
        conv = (2 * self.conv_size + work.SILU) * self.conv_channels
        return batch_size * seq_len * (inner * self.inner + step * self.num_heads + scaled + conv)

    def activation_elements(self, batch_size: int, seq_len: int) -> int:
        # x; in_proj's rows, what the convolution reads and gives; B and C as the op reads them; dt, delta, the decay;
        # delta u, y; silu(z) and y * silu(z), the norm and what out_proj reads; a state for each interval
        row = self.dim + 3 * self.inner + 3 * self.conv_channels + self.num_heads
        row += 2 * self.num_groups * self.state_dim + (3 + (self.time_step_limit is not None)) * self.num_heads
        row += 2 * self.inner if self.norm is None else 4 * self.inner + 2 * self.num_groups
        return batch_size * (seq_len * row + -(-seq_len // INTERVAL) * self.inner * self.state_dim)

    def parallel_plan(self) -> ParallelPlan:
        return ParallelPlan(
            context="pass_state",
            reason="in_proj stacks z, x, B, C and dt, and a group's norm runs over its heads, so rows are not split "
            "as they lie",
        )


def _heads(inner: int, num_heads: int | None, head_dim: int | None) -> tuple[int, int]:
    """Number and width of heads for `inner` = expand * dim channels."""
    if num_heads is None:
        width = head_dim or math.gcd(inner, 64)
        count = inner // width
    else:
        count, width = num_heads, head_dim or inner // num_heads
    if count * width != inner:
        raise ValueError(
            f"expand * dim = {inner} must equal num_heads * head_dim, got num_heads={num_heads}, "
            f"head_dim={head_dim}; give only one of them, a divisor of {inner}"
        )
    return count, width
