"""What the recurrent mixers share: gated head norm, short convolution, decays, the linear-attention layer.

Not a block itself: `linear_attention`, `gla` and `retention` are `LinearMixer` with a feature map and a decay.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.contract import Block, ParallelPlan, State, init_linear_, linear_flops, refuse_packed_streaming, state_dtype
from zoo.kernels.dispatch import check_backend
from zoo.kernels.linear_attention import flops as linear_attention_flops
from zoo.kernels.linear_attention import linear_attention
from zoo.kernels.short_conv import short_conv


def default_heads(dim: int, width: int = 64, at_least: int = 4) -> int:
    """About dim / width heads, at least four, dividing dim."""
    wanted = max(at_least, dim // width)
    return next(n for n in range(wanted, 0, -1) if dim % n == 0)


def wide(x: Tensor) -> Tensor:
    """x in fp32, fp64 where it is fp64: for gates, decays and norms."""
    return x if x.dtype == torch.float64 else x.float()


def previous(carried: Tensor) -> Tensor:
    """Read a state tensor that this call will overwrite: a copy where autograd may keep it. What is written back
    is detached, so that segments are trained one after the other (truncated backpropagation)."""
    return carried.clone() if torch.is_grad_enabled() else carried


def l2_normalise(x: Tensor) -> Tensor:
    """x / sqrt(sum x^2 + 1e-6) over the last dimension."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


# -------------------------------------------------------------------------------------------- decays
def softplus_decay(a: Tensor, A_log: Tensor, dt_bias: Tensor) -> Tensor:
    """g = -exp(A_log) softplus(a + dt_bias) <= 0, in fp32 (fp64)."""
    return -wide(A_log).exp() * F.softplus(wide(a) + wide(dt_bias))


def reset_softplus_decay_(A_log: Tensor, dt_bias: Tensor, low: float, high: float) -> None:
    """exp(A_log) ~ U(low, high); softplus(dt_bias) log-uniform in [1e-3, 1e-1]."""
    nn.init.uniform_(A_log, max(low, 1e-4), high)
    nn.init.uniform_(dt_bias, math.log(1e-3), math.log(1e-1))
    with torch.no_grad():
        A_log.log_()
        step = dt_bias.exp()
        dt_bias.copy_(step + torch.log(-torch.expm1(-step)))  # inverse of softplus


def alibi_slopes(num_heads: int, like: Tensor) -> Tensor:
    """2^(-8(h+1)/H) for a power of two; else those of the lower power, then every second of the higher one."""
    lower = 1 << (num_heads.bit_length() - 1)

    def powers(n: int, count: int, step: int) -> Tensor:
        index = torch.arange(0, count * step, step, device=like.device, dtype=wide(like).dtype)
        return torch.exp2(-8 * (index + 1) / n)

    if lower == num_heads:
        return powers(lower, lower, 1)
    return torch.cat([powers(lower, lower, 1), powers(2 * lower, num_heads - lower, 2)])


# ------------------------------------------------------------------------------------------- modules
class GatedHeadNorm(nn.Module):
    """RMS norm of each head, y = x / sqrt(mean(x^2) + eps) * w, then times act(gate) where a gate is given.

    x: [B, T, H, width], gate: [B, T, H * width] -> [B, T, H * width].
    """

    def __init__(
        self, width: int, *, activation: Literal["silu", "sigmoid"] = "silu", eps: float = 1e-5, device=None, dtype=None
    ):
        super().__init__()
        self.eps, self.activation = eps, activation
        self.weight = nn.Parameter(torch.empty(width, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        y = wide(x)
        y = (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps) * wide(self.weight)).flatten(-2)
        if gate is not None:
            y = y * (F.silu(wide(gate)) if self.activation == "silu" else wide(gate).sigmoid())
        return y.to(x.dtype if gate is None else gate.dtype)


class ShortConv(nn.Module):
    """Weights of a causal depthwise convolution, [C, 1, W] as in `nn.Conv1d`; tap W-1 is the current token."""

    def __init__(self, channels: int, width: int, *, bias: bool = False, device=None, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, width, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(channels, device=device, dtype=dtype)) if bias else None

    def reset_parameters(self) -> None:
        bound = self.weight.shape[-1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor, carried: Tensor | None, doc_ids: Tensor | None, backend: str = "auto") -> Tensor:
        """SiLU of the convolution of x [B, T, C]; carried [B, W-1, C] is overwritten with the newest inputs."""
        return silu_conv(x, self.weight, self.bias, carried, doc_ids, backend)


def silu_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, carried: Tensor | None, doc_ids: Tensor | None, backend: str
) -> Tensor:
    """SiLU(conv(x)), continuing and overwriting `carried` where given; weight: [C, 1, W]."""
    y, last = short_conv(x, weight[:, 0], bias, activation="silu", state=carried, doc_ids=doc_ids, backend=backend)
    if carried is not None:
        carried.copy_(last.detach())
    return y


@dataclass
class LinearState(State):
    """memory: [B, H, Dk, Dv], the sum of decayed k v^T."""

    memory: Tensor


class LinearMixer(Block):
    """y = W_o (norm(o) * silu(W_g x)), o = linear_attention(W_q x, W_k x, W_v x, decay), norm and gate optional.

    A subclass says what happens to q and k, and what the decay is.
    """

    decay_kind: Literal["none", "head", "channel"] = "none"
    value_extra = 0  # columns of the memory beyond the value

    def __init__(
        self,
        dim: int,
        num_heads: int,
        key_dim: int,
        value_dim: int,
        *,
        output_norm: bool,
        output_gate: bool,
        chunk_size: int,
        kernel: str,
        device=None,
        dtype=None,
    ):
        super().__init__(dim)
        check_backend("linear_attention", kernel)
        self.num_heads, self.key_dim, self.value_dim = num_heads, key_dim, value_dim
        self.chunk_size, self.kernel = chunk_size, kernel
        self.scale = key_dim**-0.5
        factory = {"device": device, "dtype": dtype}
        self.q_proj = nn.Linear(dim, num_heads * key_dim, bias=False, **factory)
        self.k_proj = nn.Linear(dim, num_heads * key_dim, bias=False, **factory)
        self.v_proj = nn.Linear(dim, num_heads * value_dim, bias=False, **factory)
        self.g_proj = nn.Linear(dim, num_heads * value_dim, bias=False, **factory) if output_gate else None
        self.o_norm = GatedHeadNorm(value_dim, **factory) if output_norm else None
        self.o_proj = nn.Linear(num_heads * value_dim, dim, bias=False, **factory)

    def projections(self) -> tuple[nn.Linear | None, ...]:
        """Every linear layer."""
        return self.q_proj, self.k_proj, self.v_proj, self.g_proj, self.o_proj

    def reset_parameters(self) -> None:
        for linear in self.projections():
            if linear is not None:
                init_linear_(linear)
        if self.o_norm is not None:
            self.o_norm.reset_parameters()

    def log_decay(self, x: Tensor) -> Tensor | None:
        """Log-decay in a shape that the op takes."""
        return None

    def features(
        self, q: Tensor, k: Tensor, state: State | None, positions: Tensor | None, doc_ids: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """What the op sees of q and k [B, T, H, Dk]."""
        return q, k

    def values(self, v: Tensor) -> Tensor:
        """What the op sees of v [B, T, H, Dv]."""
        return v

    def read_out(self, o: Tensor) -> Tensor:
        """[B, T, H, Dv] of what the op returned."""
        return o

    def forward(
        self, x: Tensor, *, state: State | None = None, positions: Tensor | None = None, doc_ids: Tensor | None = None
    ) -> Tensor:
        refuse_packed_streaming(state, doc_ids)
        q, k = (p(x).unflatten(-1, (-1, self.key_dim)) for p in (self.q_proj, self.k_proj))
        v = self.v_proj(x).unflatten(-1, (-1, self.value_dim))
        q, k = self.features(q, k, state, positions, doc_ids)
        o, memory = linear_attention(
            q,
            k,
            self.values(v),
            self.log_decay(x),
            scale=self.scale,
            initial_state=None if state is None else previous(state.memory),
            doc_ids=doc_ids,
            chunk_size=self.chunk_size,
            backend=self.kernel,
        )
        if state is not None:
            state.memory.copy_(memory.detach())
        o = self.read_out(o).to(x.dtype)
        gate = None if self.g_proj is None else self.g_proj(x)
        if self.o_norm is not None:
            return self.o_proj(self.o_norm(o, gate))
        o = o.flatten(-2)
        return self.o_proj(o if gate is None else o * F.silu(gate))

    def init_state(self, batch_size: int, max_len: int | None = None) -> State:
        return LinearState(self.new_memory(batch_size))

    def new_memory(self, batch_size: int) -> Tensor:
        """Zeros [B, H, Dk, Dv] in the dtype of states."""
        like = self.q_proj.weight
        shape = (batch_size, self.num_heads, self.key_dim, self.value_dim + self.value_extra)
        return like.new_zeros(shape, dtype=state_dtype(like.dtype))

    def state_bytes(self, batch_size: int, max_len: int) -> int:
        itemsize = state_dtype(self.q_proj.weight.dtype).itemsize
        return batch_size * self.num_heads * self.key_dim * (self.value_dim + self.value_extra) * itemsize

    def forward_flops(self, batch_size: int, seq_len: int, context_len: int = 0, streaming: bool = False) -> int:
        return linear_flops(batch_size * seq_len, *self.projections()) + linear_attention_flops(
            batch_size,
            seq_len,
            self.num_heads,
            self.key_dim,
            self.value_dim + self.value_extra,
            chunk_size=self.chunk_size,
            decay=self.decay_kind,
        )

    def activation_elements(self, batch_size: int, seq_len: int) -> int:
        # per token and head: q, k, v twice (projected, chunked), a row of scores and of decays, o, norm and gate;
        # per chunk and head: the state before it and what it adds
        wide_row = 4 * self.key_dim + 6 * self.value_dim + 2 * min(self.chunk_size, seq_len)
        if self.decay_kind == "channel":
            wide_row += 24 * self.key_dim
        states = 2 * -(-seq_len // self.chunk_size) * self.key_dim * self.value_dim
        return batch_size * (seq_len * (self.dim + self.num_heads * wide_row) + self.num_heads * states)

    def parallel_plan(self) -> ParallelPlan:
        column = {name: "column" for name in ("q_proj", "k_proj", "v_proj", "g_proj")}
        return ParallelPlan(
            column | {"o_norm": "replicate", "o_proj": "row"}, units=self.num_heads, context="pass_state"
        )
