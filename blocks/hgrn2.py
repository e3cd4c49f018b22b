"""HGRN2: gated linear attention whose key is what the forget gate lets go. Qin et al. 2024, arXiv:2404.07904."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.blocks.grafting import take, value_scale
from zoo.blocks.norms import RMSNorm
from zoo.blocks.recurrent import LinearState, default_heads, previous, wide
from zoo.contract import Block, ParallelPlan, State, init_linear_, linear_flops, refuse_packed_streaming, state_dtype
from zoo.kernels import work
from zoo.kernels.dispatch import check_backend
from zoo.kernels.linear import Linear
from zoo.kernels.linear_attention import INTERVAL, linear_attention
from zoo.kernels.linear_attention import flops as linear_attention_flops
from zoo.registry import register
from zoo.schema import NonNegativeInt, PositiveInt, Range
from zoo.segments import handed_on


@register(
    "hgrn2",
    kind="mixer",
    paper="arXiv:2404.07904",
    ops=("linear_attention",),
    state_growth="constant",
    relations=("hgrn2(layer_index=2, num_layers=4) == hgrn2(lower_bound=0.5)",),
    examples=({"chunk_size": 16}, {"num_heads": 2, "layer_index": 2, "num_layers": 3, "chunk_size": 8}),
)
class HGRN2(Block):
    """HGRN2: S_t = diag(f_t) S_{t-1} + (1 - f_t) v_t^T, o_t = S_t^T q_t / sqrt(Dh), y = W_o RMSNorm(o).

    f = gamma + (1 - gamma) sigmoid(W_f x) per key channel, q = silu(W_q x), v = W_i x; the norm runs over all heads
    together. `lower_bound` gamma grows with depth, by default layer_index / num_layers: where the published model
    starts, which then learns one cumulative softmax over all its layers.
    x: [B, T, D] -> y: [B, T, D]; 4 D^2 + D parameters, time O(T), state D^2 / H numbers, each a convex combination
    of values: |S| <= max |v|. As f -> 1 the state stays what it was.
    Useful: 4 D Dh FLOPs a token for the state, and D Dh products with the gate.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: PositiveInt | None = None,
        lower_bound: Annotated[float, Range(ge=0, lt=1)] | None = None,
        layer_index: NonNegativeInt = 0,
        num_layers: PositiveInt = 1,
        chunk_size: PositiveInt = 64,
        kernel: str = "auto",
        device=None,
        dtype=None,
    ):
        super().__init__(dim)
        check_backend("linear_attention", kernel)
        if layer_index >= num_layers:
            raise ValueError(f"layer_index={layer_index} must be below num_layers={num_layers}")
        self.num_heads = num_heads or default_heads(dim, 128, at_least=1)
        if dim % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} must divide dim={dim}")
        self.head_dim = dim // self.num_heads
        self.lower_bound = layer_index / num_layers if lower_bound is None else lower_bound
        self.chunk_size, self.kernel = chunk_size, kernel
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.q_proj, self.f_proj, self.i_proj, self.o_proj = (Linear(dim, dim, bias=False, **factory) for _ in range(4))
        self.g_norm = RMSNorm(dim, eps=1e-5, **factory)

    @torch.no_grad()
    def from_attention(self, q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> tuple[str, ...]:
        """Take queries, values (the input) and output of attention. Keys are 1 - f, so f takes them with the other
        sign: a token is written where its key is positive. The norm gives back the size of the values."""
        if len(v) == self.dim:
            self.g_norm.weight.copy_(value_scale(v, self.dim))
        return take(
            ("q_proj.weight", self.q_proj.weight, q), ("f_proj.weight", self.f_proj.weight, -k),
            ("i_proj.weight", self.i_proj.weight, v), ("o_proj.weight", self.o_proj.weight, o),
        )  # fmt: skip

    def reset_parameters(self) -> None:
        for linear in (self.q_proj, self.f_proj, self.i_proj, self.o_proj):
            init_linear_(linear)
        self.g_norm.reset_parameters()

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """log f and 1 - f in fp32 (fp64), both exact where f is near 0 or 1."""
        z = wide(self.f_proj(x))
        k = (1 - self.lower_bound) * torch.sigmoid(-z)
        return torch.log1p(-k) if self.lower_bound else F.logsigmoid(z), k

    def forward(
        self,
        x: Tensor,
        *,
        state: LinearState | None = None,
        positions: Tensor | None = None,
        doc_ids: Tensor | None = None,
    ) -> Tensor:
        refuse_packed_streaming(state, doc_ids)
        log_f, k = self.gates(x)
        q, k, v, log_f = (
            y.unflatten(-1, (self.num_heads, self.head_dim))
            for y in (F.silu(self.q_proj(x)), k.to(x.dtype), self.i_proj(x), log_f)
        )
        o, memory = linear_attention(
            q,
            k,
            v,
            log_f,
            scale=self.head_dim**-0.5,
            initial_state=None if state is None else previous(state.memory),
            doc_ids=doc_ids,
            chunk_size=self.chunk_size,
            backend=self.kernel,
        )
        if state is not None:
            state.memory.copy_(handed_on(memory))
        return self.o_proj(self.g_norm(o.flatten(-2)))

    def init_state(self, batch_size: int, max_len: int | None = None) -> State:
        like = self.q_proj.weight
        shape = (batch_size, self.num_heads, self.head_dim, self.head_dim)
        return LinearState(like.new_zeros(shape, dtype=state_dtype(like.dtype)))

    def state_bytes(self, batch_size: int, max_len: int) -> int:
        return batch_size * self.dim * self.head_dim * state_dtype(self.q_proj.weight.dtype).itemsize

    def forward_flops(self, batch_size: int, seq_len: int, context_len: int = 0, streaming: bool = False) -> int:
        linears = linear_flops(batch_size * seq_len, self.q_proj, self.f_proj, self.i_proj, self.o_proj)
        return linears + linear_attention_flops(
            batch_size, seq_len, self.num_heads, self.head_dim, self.head_dim, chunk_size=self.chunk_size,
            decay="channel",
        )  # fmt: skip

    def useful_flops(self, batch_size: int, seq_len: int, context_len: int = 0) -> int:
        tokens, D = batch_size * seq_len, self.head_dim
        linears = linear_flops(tokens, self.q_proj, self.f_proj, self.i_proj, self.o_proj)
        return linears + work.recurrence(work.LINEAR, tokens, self.num_heads, D, D)

    def vector_flops(self, batch_size: int, seq_len: int, context_len: int = 0) -> int:
        # silu; 1 - f, log f, f; decay of the state; norm
        return batch_size * seq_len * self.dim * (work.SILU + 4 + self.head_dim + work.RMS)

    def activation_elements(self, batch_size: int, seq_len: int) -> int:
        # x; W_q x, q; sigmoid, k, log f, and -k or else W_f x and what its logsigmoid keeps; v; o, its norm, what W_o
        # reads; a state for each interval
        states = -(-seq_len // INTERVAL) * self.dim * self.head_dim
        token = (9 if self.lower_bound else 10) * self.dim
        return batch_size * (seq_len * token + states) + self.g_norm.activation_elements(batch_size * seq_len)

    def parallel_plan(self) -> ParallelPlan:
        return ParallelPlan(context="pass_state", reason="the norm runs over all heads together")
