"""pLSTM on a line: a linear recurrence with source, transition, mark and direct gates. Pöppel et al. 2025,
arXiv:2506.11997."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.blocks.recurrent import LinearState, default_heads, previous, wide
from zoo.contract import Block, ParallelPlan, init_linear_, linear_flops, refuse_packed_streaming, state_dtype
from zoo.kernels.dispatch import check_backend
from zoo.kernels.linear import Linear
from zoo.kernels.linear_attention import INTERVAL, linear_attention
from zoo.kernels.linear_attention import flops as linear_attention_flops
from zoo.kernels.short_conv import short_conv
from zoo.registry import register
from zoo.schema import PositiveInt


@dataclass
class ParallelLSTMState(LinearState):
    """memory: [B, H, Dk, Dv]; conv: [B, W-1, D], the newest inputs."""

    conv: Tensor


def signed_decay(u: Tensor) -> tuple[Tensor, Tensor]:
    """log |tanh u| and the running product of the signs of tanh u over dimension 1."""
    # exact at both ends: near |tanh| = 1, where many tokens add up, and near 0, where eps keeps the logarithm finite
    shrink = torch.exp(-2 * u.abs().clamp(min=torch.finfo(u.dtype).eps))
    log_size = torch.log1p(-shrink) - torch.log1p(shrink)
    return log_size, torch.where(u < 0, -1.0, 1.0).to(u.dtype).cumprod(1)


@register(
    "plstm",
    kind="mixer",
    paper="arXiv:2506.11997",
    ops=("linear_attention", "short_conv"),
    state_growth="constant",
    examples=({"chunk_size": 16}, {"num_heads": 2, "conv_size": 2, "chunk_size": 24}),
)
class ParallelLSTM(Block):
    """pLSTM in one dimension: o_t = (M_t C_{t-1}^T q_t + D_t (q_t . k_t) v_t) / sqrt(Dk),
    C_t = T_t C_{t-1} + S_t k_t v_t^T: the past is read before the token is written.

    Per head and token, from c = conv(x): source S, mark M and direct D are sigmoid(W c + b), b = -5; the transition
    T = tanh(5 (w c + b)), b = 1, may be negative, so that a head can count parity. q and k come from c, v from x;
    y = W_o RMSNorm_head(o) + p * c. The sign of a product of transitions is kept apart, C = sign * C', and C' is
    linear attention with log-decay log |T| <= 0, its queries shifted by one token.
    One dimension of state tracking, that is scalar gates: the released layer also has J x J transitions. Its
    projections are separate for each head, here they are full.
    x: [B, T, D] -> y: [B, T, D]; time O(T), state D^2 / H numbers and W - 1 inputs.
    With all four gates 1 the core is causal linear attention.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: PositiveInt | None = None,
        conv_size: PositiveInt = 4,
        chunk_size: PositiveInt = 64,
        kernel: str = "auto",
        device=None,
        dtype=None,
    ):
        super().__init__(dim)
        check_backend("linear_attention", kernel)
        self.num_heads = num_heads or default_heads(dim)
        if dim % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} must divide dim = {dim}")
        self.head_dim = dim // self.num_heads
        self.chunk_size, self.kernel = chunk_size, kernel
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv = nn.Conv1d(dim, dim, conv_size, groups=dim, **factory)
        self.q_proj = Linear(dim, dim, **factory)
        self.k_proj = Linear(dim, dim, **factory)
        self.v_proj = Linear(dim, dim, **factory)
        self.source = Linear(dim, self.num_heads, **factory)
        self.transition = Linear(dim, self.num_heads, **factory)
        self.mark = Linear(dim, self.num_heads, **factory)
        self.direct = Linear(dim, self.num_heads, **factory)
        self.mhnorm = nn.RMSNorm(dim, eps=1e-5, **factory)  # its weight; the mean is taken over a head
        self.o_proj = Linear(dim, dim, bias=False, **factory)
        self.passthrough = nn.Parameter(torch.empty(dim, **factory))

    def gates(self) -> tuple[nn.Linear, ...]:
        """The maps to one number a head."""
        return self.source, self.transition, self.mark, self.direct

    def projections(self) -> tuple[nn.Linear, ...]:
        """Every linear layer."""
        return self.q_proj, self.k_proj, self.v_proj, *self.gates(), self.o_proj

    def reset_parameters(self) -> None:
        """The gates start constant, with T = tanh(5) = 0.9999 a token: nothing is forgotten."""
        self.conv.reset_parameters()
        self.mhnorm.reset_parameters()
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            init_linear_(linear)
        for linear in self.gates():
            nn.init.zeros_(linear.weight)
            nn.init.constant_(linear.bias, 1.0 if linear is self.transition else -5.0)
        nn.init.ones_(self.passthrough)

    def forward(
        self,
        x: Tensor,
        *,
        state: ParallelLSTMState | None = None,
        positions: Tensor | None = None,
        doc_ids: Tensor | None = None,
    ) -> Tensor:
        refuse_packed_streaming(state, doc_ids)
        before = None if state is None else previous(state.memory)
        c, newest = short_conv(
            x, self.conv.weight[:, 0], self.conv.bias, state=None if state is None else state.conv, doc_ids=doc_ids
        )
        q, k, v = (p(z).unflatten(-1, (-1, self.head_dim)) for p, z in zip(self.projections(), (c, c, x)))
        source, mark, direct = (wide(p(c)).sigmoid()[..., None] for p in (self.source, self.mark, self.direct))
        log_decay, sign = signed_decay(5 * wide(self.transition(c)))
        scale, v, sign = self.head_dim**-0.5, wide(v), sign[..., None]
        # token t + 1 reads what is there after token t; the last query waits for the next segment
        past, memory = linear_attention(
            F.pad(q[:, 1:], (0, 0, 0, 0, 0, 1)),
            k,
            v * (sign * source),
            log_decay,
            scale=scale,
            initial_state=before,
            doc_ids=doc_ids,
            chunk_size=self.chunk_size,
            backend=self.kernel,
        )
        first = torch.zeros_like(v[:, :1])
        if before is not None:
            first = (wide(q[:, :1]).transpose(1, 2) @ before).transpose(1, 2) * scale
        past = torch.cat([first, (past * sign)[:, :-1]], 1)
        if doc_ids is not None:
            starts = F.pad(doc_ids[:, 1:] != doc_ids[:, :-1], (1, 0))
            past = past.masked_fill(starts[..., None, None], 0)
        if state is not None:
            state.memory.copy_((memory * sign[:, -1, :, None]).detach())
            state.conv.copy_(newest.detach())
        o = mark * past + direct * scale * (wide(q) * wide(k)).sum(-1, keepdim=True) * v
        o = F.rms_norm(o, o.shape[-1:], eps=self.mhnorm.eps).flatten(-2) * wide(self.mhnorm.weight)
        return self.o_proj(o.to(x.dtype)) + self.passthrough * c

    def init_state(self, batch_size: int, max_len: int | None = None) -> ParallelLSTMState:
        like = self.q_proj.weight
        shape = (batch_size, self.num_heads, self.head_dim, self.head_dim)
        return ParallelLSTMState(
            like.new_zeros(shape, dtype=state_dtype(like.dtype)), like.new_zeros(batch_size, self.width, self.dim)
        )

    @property
    def width(self) -> int:
        """Inputs that the convolution carries."""
        return self.conv.kernel_size[0] - 1

    def state_bytes(self, batch_size: int, max_len: int) -> int:
        memory = self.dim * self.head_dim * state_dtype(self.q_proj.weight.dtype).itemsize
        return batch_size * (memory + self.width * self.dim * self.itemsize)

    def forward_flops(self, batch_size: int, seq_len: int, context_len: int = 0, streaming: bool = False) -> int:
        first = 2 * batch_size * self.dim * self.head_dim if streaming else 0
        core = linear_attention_flops(
            batch_size, seq_len, self.num_heads, self.head_dim, self.head_dim, chunk_size=self.chunk_size
        )
        return linear_flops(batch_size * seq_len, *self.projections()) + core + first

    def activation_elements(self, batch_size: int, seq_len: int) -> int:
        # x and its convolution; q, its shifted copy, k, v and what is written; what is read and its shift, both terms
        # and their sum, the norm; and a state for each interval
        states = -(-seq_len // INTERVAL) * self.dim * self.head_dim
        return batch_size * (seq_len * (13 * self.dim + 8 * self.num_heads) + states)

    def parallel_plan(self) -> ParallelPlan:
        column = ("q_proj", "k_proj", "v_proj", "source", "transition", "mark", "direct", "mhnorm")
        plan = {**dict.fromkeys(column, "column"), "o_proj": "row", "conv": "replicate", "passthrough": "replicate"}
        return ParallelPlan(plan, units=self.num_heads, context="pass_state")
