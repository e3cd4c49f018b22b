"""Gated DeltaNet: forget by a scalar, then correct what is stored under the key. Yang et al. 2024, arXiv:2412.06464."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zoo.blocks.grafting import SMALL, inverse_softplus, memories, pass_through_, value_scale
from zoo.blocks.recurrent import (
    GatedHeadNorm,
    LinearState,
    ShortConv,
    default_heads,
    l2_normalise,
    previous,
    reset_softplus_decay_,
    silu_conv,
    softplus_decay,
    wide,
)
from zoo.contract import Block, ParallelPlan, State, init_linear_, linear_flops, refuse_packed_streaming, state_dtype
from zoo.kernels import work
from zoo.kernels.delta_rule import delta_rule
from zoo.kernels.delta_rule import flops as delta_rule_flops
from zoo.kernels.dispatch import check_backend
from zoo.kernels.linear import Linear
from zoo.registry import register
from zoo.schema import NonNegativeInt, PositiveFloat, PositiveInt
from zoo.segments import handed_on


@dataclass
class ConvLinearState(LinearState):
    """memory and conv: the last W-1 inputs [B, W-1, C] of the convolutions of q, k and v."""

    conv: Tensor


@register(
    "gated_deltanet",
    kind="mixer",
    paper="arXiv:2412.06464",
    ops=("delta_rule", "short_conv"),
    state_growth="constant",
    relations=("gated_deltanet(head_dim=16, expand_v=1.0, output_gate=False) == deltanet() at A_log=-inf",),
    examples=(
        {"chunk_size": 16},
        {"num_heads": 2, "num_v_heads": 6, "head_dim": 8, "allow_neg_eigval": True, "chunk_size": 16},
        {"conv_size": 0, "output_gate": False, "chunk_size": 24},
    ),
)
class GatedDeltaNet(Block):
    """Gated DeltaNet: S_t = alpha_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T, o_t = S_t^T q_t / sqrt(Dk).

    q, k, v = silu(conv(W x)), q and k of unit length per head; alpha_t = exp(-exp(A_log) softplus(W_a x + dt_bias))
    and beta_t = sigmoid(W_b x) per value head (`allow_neg_eigval` doubles beta, for state tracking);
    y = W_o (RMSNorm_head(o) * silu(W_g x)). num_v_heads value heads share num_heads keys, consecutively.
    head_dim defaults to 3/4 D / H and a value head to expand_v head_dim, 6 D^2 parameters.
    x: [B, T, D] -> y: [B, T, D]; time O(T), state Hv Dk Dv numbers and W-1 inputs of the convolutions.
    Without decay it is DeltaNet; on orthonormal keys, decayed linear attention of beta v.
    Useful: 6 Dk Dv FLOPs a value head and token (S k, the update, S q), and Dk Dv products with the decay.
    """

    interval = 32

    def __init__(
        self,
        dim: int,
        *,
        num_heads: PositiveInt | None = None,
        num_v_heads: PositiveInt | None = None,
        head_dim: PositiveInt | None = None,
        expand_v: PositiveFloat = 2.0,
        conv_size: NonNegativeInt = 4,
        output_gate: bool = True,
        allow_neg_eigval: bool = False,
        norm_eps: PositiveFloat = 1e-5,
        chunk_size: PositiveInt = 64,
        kernel: str = "auto",
        device=None,
        dtype=None,
    ):
        super().__init__(dim)
        check_backend("delta_rule", kernel)
        self.num_heads = num_heads or default_heads(dim, width=128)
        self.num_v_heads = num_v_heads or self.num_heads
        self.head_dim = head_dim or max(3 * dim // (4 * self.num_heads), 1)
        self.value_dim = int(expand_v * self.head_dim)
        if self.num_v_heads % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} must divide num_v_heads={self.num_v_heads}")
        if self.value_dim < 1:
            raise ValueError(f"expand_v={expand_v} leaves no value channel at head_dim={self.head_dim}")
        self.conv_size, self.allow_neg_eigval = conv_size, allow_neg_eigval
        self.chunk_size, self.kernel = chunk_size, kernel
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        keys, values = self.num_heads * self.head_dim, self.value_width
        self.q_proj = Linear(dim, keys, bias=False, **factory)
        self.k_proj = Linear(dim, keys, bias=False, **factory)
        self.v_proj = Linear(dim, values, bias=False, **factory)
        self.a_proj = Linear(dim, self.num_v_heads, bias=False, **factory)
        self.b_proj = Linear(dim, self.num_v_heads, bias=False, **factory)
        self.A_log = nn.Parameter(torch.empty(self.num_v_heads, **factory))
        self.dt_bias = nn.Parameter(torch.empty(self.num_v_heads, **factory))
        if conv_size:
            self.q_conv1d = ShortConv(keys, conv_size, **factory)
            self.k_conv1d = ShortConv(keys, conv_size, **factory)
            self.v_conv1d = ShortConv(values, conv_size, **factory)
        self.g_proj = Linear(dim, values, bias=False, **factory) if output_gate else None
        self.o_norm = GatedHeadNorm(self.value_dim, eps=norm_eps, **factory)
        self.o_proj = Linear(values, dim, bias=False, **factory)

    @property
    def value_width(self) -> int:
        return self.num_v_heads * self.value_dim

    @property
    def conv_channels(self) -> int:
        return 2 * self.num_heads * self.head_dim + self.value_width

    def projections(self) -> tuple[nn.Linear | None, ...]:
        """Every linear layer."""
        return self.q_proj, self.k_proj, self.v_proj, self.a_proj, self.b_proj, self.g_proj, self.o_proj

    def convolutions(self) -> tuple[ShortConv, ...]:
        """The convolutions of q, k and v, none where conv_size is 0."""
        return (self.q_conv1d, self.k_conv1d, self.v_conv1d) if self.conv_size else ()

    @staticmethod
    def like_attention(dim: int, num_heads: int, num_kv_heads: int, head_dim: int) -> dict[str, Any]:
        """Attention has no gate at its output."""
        return {"output_gate": False}

    @torch.no_grad()
    def from_attention(self, q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> tuple[str, ...]:
        """Projections have the names of those of attention. Every update is half of a correction; what the convolutions
        let through is small, where SiLU is linear, and all that follows is normed."""
        if len(v) == self.value_width:
            self.o_norm.weight.copy_(value_scale(v, self.num_v_heads))
        for linear in (self.a_proj, self.b_proj):
            linear.weight.zero_()
        for conv in self.convolutions():
            pass_through_(conv, SMALL)
        self.A_log.zero_()
        self.dt_bias.copy_(inverse_softplus(1 / memories(self.num_v_heads, self.dt_bias)))
        return ()

    def reset_parameters(self) -> None:
        for linear in self.projections():
            if linear is not None:
                init_linear_(linear)
        for module in (*self.convolutions(), self.o_norm):
            module.reset_parameters()
        reset_softplus_decay_(self.A_log, self.dt_bias, 0.0, 16.0)

    def forward(
        self,
        x: Tensor,
        *,
        state: ConvLinearState | None = None,
        positions: Tensor | None = None,
        doc_ids: Tensor | None = None,
    ) -> Tensor:
        refuse_packed_streaming(state, doc_ids)
        parts = [self.q_proj(x), self.k_proj(x), self.v_proj(x)]
        widths = [p.shape[-1] for p in parts]
        qkv = torch.cat(parts, -1)
        if self.conv_size:  # one convolution over the channels of all three
            weight = torch.cat([conv.weight for conv in self.convolutions()])
            qkv = silu_conv(qkv, weight, None, None if state is None else state.conv, doc_ids, "auto")
        else:
            qkv = nn.functional.silu(qkv)
        q, k, v = qkv.split(widths, -1)
        q, k = (l2_normalise(wide(t).unflatten(-1, (-1, self.head_dim))) for t in (q, k))
        beta = wide(self.b_proj(x)).sigmoid() * (2 if self.allow_neg_eigval else 1)
        o, memory = delta_rule(
            q,
            k,
            v.unflatten(-1, (-1, self.value_dim)),
            beta,
            softplus_decay(self.a_proj(x), self.A_log, self.dt_bias),
            scale=self.head_dim**-0.5,
            initial_state=None if state is None else previous(state.memory),
            doc_ids=doc_ids,
            chunk_size=self.chunk_size,
            backend=self.kernel,
        )
        if state is not None:
            state.memory.copy_(handed_on(memory))
        return self.o_proj(self.o_norm(o, None if self.g_proj is None else self.g_proj(x)))

    def init_state(self, batch_size: int, max_len: int | None = None) -> State:
        like = self.q_proj.weight
        shape = (batch_size, self.num_v_heads, self.head_dim, self.value_dim)
        return ConvLinearState(
            like.new_zeros(shape, dtype=state_dtype(like.dtype)),
            like.new_zeros(batch_size, max(self.conv_size - 1, 0), self.conv_channels),
        )

    def state_bytes(self, batch_size: int, max_len: int) -> int:
        memory = self.head_dim * self.value_width * state_dtype(self.q_proj.weight.dtype).itemsize
        return batch_size * (memory + max(self.conv_size - 1, 0) * self.conv_channels * self.itemsize)

    def forward_flops(self, batch_size: int, seq_len: int, context_len: int = 0, streaming: bool = False) -> int:
        return linear_flops(batch_size * seq_len, *self.projections()) + delta_rule_flops(
            batch_size,
            seq_len,
            self.num_v_heads,
            self.head_dim,
            self.value_dim,
            num_groups=self.num_heads,
            chunk_size=self.chunk_size,
        )

    def useful_flops(self, batch_size: int, seq_len: int, context_len: int = 0) -> int:
        tokens = batch_size * seq_len
        state = work.recurrence(work.DELTA, tokens, self.num_v_heads, self.head_dim, self.value_dim)
        return linear_flops(tokens, *self.projections()) + state

    def vector_flops(self, batch_size: int, seq_len: int, context_len: int = 0) -> int:
        conv = (2 * self.conv_size + work.SILU) * self.conv_channels
        unit = work.UNIT * 2 * self.num_heads * self.head_dim
        gate = work.SILU + 1 if self.g_proj is not None else 0
        # decay of the state, beta (v - S k); norm and gate; alpha and beta
        head = self.value_dim * (self.head_dim + 2 + work.RMS + gate) + 3 + work.SIGMOID + self.allow_neg_eigval
        return batch_size * seq_len * (conv + unit + self.num_v_heads * head)

    def activation_elements(self, batch_size: int, seq_len: int) -> int:
        # x; q, k, v side by side, convolved, and as the op reads them; lengths of q and k; sigmoid and beta; the decay
        # and what it is made of; o, its norm and gate, what W_o reads; a state every 32 tokens
        tokens = batch_size * seq_len
        token = self.dim + 3 * self.conv_channels + 2 * self.num_heads + 5 * self.num_v_heads + self.value_width
        norm = self.o_norm.activation_elements(tokens * self.num_v_heads, self.g_proj is not None)
        states = -(-seq_len // 32) * self.head_dim * self.value_width
        return tokens * token + norm + batch_size * states

    def parallel_plan(self) -> ParallelPlan:
        column = ["q_proj", "k_proj", "v_proj", "a_proj", "b_proj", "g_proj", "A_log", "dt_bias"]
        column += ["q_conv1d", "k_conv1d", "v_conv1d"] if self.conv_size else []
        plan = dict.fromkeys(column, "column") | {"o_norm": "replicate", "o_proj": "row"}
        return ParallelPlan(plan, units=self.num_heads, context="pass_state")
