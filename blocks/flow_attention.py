"""Causal flow attention: linear attention whose tokens exchange a conserved flow. Wu et al. 2022 (Flowformer),
arXiv:2202.06258."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zoo.blocks.grafting import take
from zoo.blocks.recurrent import LinearState, default_heads, previous, wide
from zoo.contract import (
    Block,
    ParallelPlan,
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
from zoo.kernels.linear_attention import INTERVAL, linear_attention
from zoo.kernels.linear_attention import flops as linear_attention_flops
from zoo.registry import register
from zoo.schema import PositiveFloat, PositiveInt
from zoo.segments import handed_on


@dataclass
class FlowState(LinearState):
    """memory: [B, H, Dk, Dv]; flow: [B, H, 2, Dk], sums of k and q; conserved: [B, H, 2, Dk], sums of k * outgoing and
    q * incoming; competition: [B, H], sum of exp(source); length: [B], tokens seen."""

    flow: Tensor
    conserved: Tensor
    competition: Tensor
    length: Tensor


def running_sum(x: Tensor, before: Tensor | None, doc_ids: Tensor | None) -> Tensor:
    """Sum over the tokens of a document up to each one, x [B, T, ...]. `before` [B, ...], the sum over earlier
    segments, is overwritten with the one at the end of this segment."""
    total, last = diagonal_scan(
        x.new_zeros(()), x, initial_state=None if before is None else previous(before), doc_ids=doc_ids
    )
    if before is not None:
        before.copy_(handed_on(last))
    return total


@register(
    "flow_attention",
    kind="mixer",
    paper="arXiv:2202.06258",
    ops=("linear_attention", "diagonal_scan"),
    state_growth="constant",
    examples=({"chunk_size": 16}, {"num_heads": 2, "source_clamp": 10.0, "chunk_size": 24}),
)
class FlowAttention(Block):
    """Causal flow attention: o_t = sigmoid(s_t) / (q_t . sum_{j<=t} k_j) * sum_{j<=t} (q_t . k_j) c_j v_j.

    q = sigmoid(W_q x), k = sigmoid(W_k x); sums run over j <= t. Incoming flow of the sinks a_t = t / (q_t . sum k_j),
    outgoing flow of the sources b_t = t / (k_t . sum q_j). With each of them conserved, s_t = q_t . sum k_j b_j / t
    allocates to sinks, and sources compete: r_t = clamp(k_t . sum q_j a_j / t), c_t = t exp(r_t) / sum exp(r_j).
    Both factors of these four products have 1e-6 added. Names are those of the released code; its dropout is left out.
    r is clamped to [-source_clamp, source_clamp]: 1 as published, 10 in the authors' reinforcement learning code.
    x: [B, T, D] -> y: [B, T, D]; time O(T), state H (Dk Dv + 4 Dk + 1) numbers and a count.
    With c = 1 and s large it is `linear_attention` with a sigmoid feature map.
    Useful: 4 H Dk Dv FLOPs a token for the memory; the flows are elementwise.
    """

    eps = 1e-6

    def __init__(
        self,
        dim: int,
        *,
        num_heads: PositiveInt | None = None,
        source_clamp: PositiveFloat = 1.0,
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
        self.source_clamp, self.chunk_size, self.kernel = source_clamp, chunk_size, kernel
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.query_projection = Linear(dim, dim, **factory)
        self.key_projection = Linear(dim, dim, **factory)
        self.value_projection = Linear(dim, dim, **factory)
        self.out_projection = Linear(dim, dim, **factory)

    def projections(self) -> tuple[nn.Linear, ...]:
        """Every linear layer."""
        return self.query_projection, self.key_projection, self.value_projection, self.out_projection

    @torch.no_grad()
    def from_attention(self, q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> tuple[str, ...]:
        """Take the maps of attention."""
        names = ("query_projection", "key_projection", "value_projection", "out_projection")
        for linear in self.projections():
            linear.bias.zero_()
        maps = zip(names, self.projections(), (q, k, v, o), strict=True)
        return take(*((f"{name}.weight", linear.weight, theirs) for name, linear, theirs in maps))

    def reset_parameters(self) -> None:
        for linear in self.projections():
            init_linear_(linear)

    def forward(
        self,
        x: Tensor,
        *,
        state: FlowState | None = None,
        positions: Tensor | None = None,
        doc_ids: Tensor | None = None,
    ) -> Tensor:
        refuse_packed_streaming(state, doc_ids)
        flow, conserved, competition = (
            (None, None, None) if state is None else (state.flow, state.conserved, state.competition)
        )
        q, k, v = (wide(p(x)).unflatten(-1, (-1, self.head_dim)) for p in self.projections()[:3])
        count = positions_from(doc_ids, x.shape[0], x.shape[1], x.device) + 1
        if state is not None:
            count = count + state.length[:, None]
            state.length.copy_(count[:, -1])
        t = count[..., None].to(q.dtype)
        qk = torch.stack([q.sigmoid(), k.sigmoid()], -2)  # [B, T, H, 2, Dk]
        kq, positive = qk.flip(-2), qk + self.eps

        def meet(total: Tensor) -> tuple[Tensor, Tensor]:
            """[B, T, H] each: q times the first half of total [B, T, H, 2, Dk], k times the second."""
            sinks, sources = (positive * (total + self.eps)).sum(-1).unbind(-1)
            return sinks, sources

        sinks, sources = meet(running_sum(kq, flow, doc_ids))
        outgoing_incoming = torch.stack([t / sources, t / sinks], -1)
        allocation, source = meet(running_sum(kq * outgoing_incoming[..., None], conserved, doc_ids))
        weight = (source / t).clamp(-self.source_clamp, self.source_clamp).exp()
        weight = weight / running_sum(weight, competition, doc_ids) * t
        q, k = qk.to(x.dtype).unbind(-2)
        o, memory = linear_attention(
            q,
            k,
            v * weight[..., None],
            initial_state=None if state is None else previous(state.memory),
            doc_ids=doc_ids,
            chunk_size=self.chunk_size,
            backend=self.kernel,
        )
        if state is not None:
            state.memory.copy_(handed_on(memory))
        o = o * ((allocation / t).sigmoid() / sinks)[..., None]
        return self.out_projection(o.flatten(-2).to(x.dtype))

    def init_state(self, batch_size: int, max_len: int | None = None) -> FlowState:
        like, shape = self.query_projection.weight, (batch_size, self.num_heads)
        memory = like.new_zeros(*shape, self.head_dim, self.head_dim, dtype=state_dtype(like.dtype))
        flow = memory.new_zeros(*shape, 2, self.head_dim)
        length = memory.new_zeros(batch_size, dtype=torch.int64)
        return FlowState(memory, flow, flow.clone(), memory.new_zeros(shape), length)

    def state_bytes(self, batch_size: int, max_len: int) -> int:
        numbers = self.num_heads * (self.head_dim * (self.head_dim + 4) + 1)
        itemsize = state_dtype(self.query_projection.weight.dtype).itemsize
        return batch_size * (numbers * itemsize + torch.int64.itemsize)

    def forward_flops(self, batch_size: int, seq_len: int, context_len: int = 0, streaming: bool = False) -> int:
        return linear_flops(batch_size * seq_len, *self.projections()) + linear_attention_flops(
            batch_size,
            seq_len,
            self.num_heads,
            self.head_dim,
            self.head_dim,
            chunk_size=self.chunk_size,
            decay="none",
        )

    def useful_flops(self, batch_size: int, seq_len: int, context_len: int = 0) -> int:
        tokens, D = batch_size * seq_len, self.head_dim
        state = work.recurrence(work.LINEAR, tokens, self.num_heads, D, D)
        return linear_flops(tokens, *self.projections()) + state

    def vector_flops(self, batch_size: int, seq_len: int, context_len: int = 0) -> int:
        # of queries and of keys: sigmoid, two running sums, four factors of two flows; v and o weighted
        number = 2 * (work.SIGMOID + 3 + 2 * 4) + 2
        return batch_size * seq_len * (self.dim * number + 10 * self.num_heads)

    def activation_elements(self, batch_size: int, seq_len: int) -> int:
        # x, v; sigmoids, swapped, plus eps; of both pairs of sums what is summed, decays, results, plus eps; q and k as
        # the op reads them, weighted values, what is read and its share; flows and weights of heads; a state for each
        # interval
        states = -(-seq_len // INTERVAL) * self.dim * self.head_dim
        return batch_size * (seq_len * (25 * self.dim + 11 * self.num_heads + 1) + states)

    def parallel_plan(self) -> ParallelPlan:
        column = ("query_projection", "key_projection", "value_projection")
        return ParallelPlan(
            {**dict.fromkeys(column, "column"), "out_projection": "row"}, units=self.num_heads, context="pass_state"
        )
