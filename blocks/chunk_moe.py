"""Mixture of experts routed by chunk, causally (the chunk router of Hydra, arXiv:2508.15099, made causal).

m_c = mean of x over chunk c; chunk c is routed by r_c = m_{c-1}, the first chunk of a document by a learned
vector; l = W_g r_c / temperature; the top_k best experts get the softmax over their logits; all tokens of the
chunk share experts and weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.blocks.chunks import finished_chunks, max_finished
from zoo.blocks.experts import SwiGLUExperts
from zoo.blocks.measure import balance_loss, group_counts, load_metrics, recording
from zoo.blocks.swiglu import swiglu_width
from zoo.contract import (
    Block,
    Cost,
    Mode,
    ParallelPlan,
    State,
    add_auxiliary_loss,
    counted_by_all,
    init_linear_,
    positions_from,
    refuse_packed_streaming,
    state_dtype,
)
from zoo.kernels import work
from zoo.kernels.dispatch import check_backend
from zoo.kernels.linear import Linear
from zoo.kernels.precision import no_autocast
from zoo.registry import register
from zoo.row import Slice, before, current, joined
from zoo.schema import NonNegativeFloat, PositiveFloat, PositiveInt
from zoo.segments import handed_on


@dataclass
class ChunkRouteState(State):
    """total: [B, D], sum over the unfinished chunk; summary: [B, D], mean of the last finished one; position: [B]."""

    total: Tensor
    summary: Tensor
    position: Tensor


@register(
    "chunk_moe",
    kind="ffn",
    paper="arXiv:2508.15099",
    ops=("grouped_mm",),
    state_growth="constant",
    relations=(
        "chunk_moe(num_experts=1, top_k=1, hidden_dim=32, chunk_size=7) == swiglu(hidden_dim=32) at "
        "experts.gate_up_proj[0, :32]=gate_proj.weight, experts.gate_up_proj[0, 32:]=up_proj.weight, "
        "experts.down_proj[0]=down_proj.weight",
    ),
    examples=(
        {"hidden_dim": 32, "chunk_size": 16},
        {"hidden_dim": 32, "num_experts": 4, "top_k": 3, "chunk_size": 5, "temperature": 2.0, "aux_coef": 0.0},
    ),
)
class ChunkMixtureOfExperts(Block):
    """Chunk-routed mixture of SwiGLU experts: y_t = sum_{i in top-k(c)} w_ci FFN_i(x_t), t in chunk c.

    Chunk c of chunk_size tokens is routed by the mean input of chunk c-1 (the first of a document by the learned
    `first_chunk`), so no token sees its own chunk's future: w_c = softmax over the top_k best logits of
    W_g mean(x_{c-1}) / temperature. In training aux_coef * E sum f_i P_i over the tokens of the call is added.

    x: [B, T, D] -> y: [B, T, D]; state: sum of the open chunk, mean of the last full one, position. Parameters
    E 3 D hidden_dim + D E + D; FLOPs a token 6 top_k D hidden_dim. With one expert: SwiGLU for any chunk_size.
    Useful: 6 D hidden_dim FLOPs a token for each chosen expert, 2 D E for each chunk that begins.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_experts: PositiveInt = 8,
        top_k: PositiveInt = 2,
        hidden_dim: PositiveInt | None = None,
        chunk_size: PositiveInt = 32,
        temperature: PositiveFloat = 1.0,
        aux_coef: NonNegativeFloat = 0.01,
        kernel: str = "auto",
        device=None,
        dtype=None,
    ):
        super().__init__(dim)
        if top_k > num_experts:
            raise ValueError(f"top_k={top_k} is more than num_experts={num_experts}; lower top_k")
        if top_k == 1 < num_experts:
            raise ValueError("top_k=1 gives the chosen expert weight 1, so the router would learn nothing from the "
                             "loss; set top_k to 2 or more")  # fmt: skip
        check_backend("grouped_mm", kernel)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_experts, self.top_k, self.chunk_size = num_experts, top_k, chunk_size
        self.temperature, self.aux_coef = temperature, aux_coef
        self.hidden_dim = hidden_dim or -(-swiglu_width(dim) // (16 * top_k)) * 16
        self.gate = Linear(dim, num_experts, bias=False, **factory)
        self.first_chunk = nn.Parameter(torch.empty(dim, **factory))
        self.experts = SwiGLUExperts(num_experts, dim, self.hidden_dim, kernel, **factory)
        self.metrics: dict[str, Tensor] = {}

    def reset_parameters(self) -> None:
        init_linear_(self.gate)
        nn.init.normal_(self.first_chunk, std=0.02)
        self.experts.reset_parameters()

    def init_state(self, batch_size: int, max_len: int | None = None) -> ChunkRouteState:
        like = self.gate.weight
        zeros = torch.zeros(batch_size, self.dim, dtype=state_dtype(like.dtype), device=like.device)
        position = torch.zeros(batch_size, dtype=torch.int64, device=like.device)
        return ChunkRouteState(zeros, zeros.clone(), position)

    def forward(
        self,
        x: Tensor,
        *,
        state: ChunkRouteState | None = None,
        positions: Tensor | None = None,
        doc_ids: Tensor | None = None,
    ) -> Tensor:
        refuse_packed_streaming(state, doc_ids)
        B, T, D = x.shape
        position = positions_from(doc_ids, B, T, x.device)
        if state is not None:
            position = position + state.position[:, None]
        halo = 0
        if (part := current()) is None:
            chunks = finished_chunks(x, position, self.chunk_size, doc_ids, None if state is None else state.total)
        else:
            halo = 2 * self.chunk_size - 1  # the chunk before that of the first token lies in it
            chunks = finished_chunks(*_reaching_back(part, x, position, self.chunk_size, doc_ids, halo))
        wide = chunks.means.dtype
        # row 0 serves the chunk that is open when the call begins, row j the chunk after the j-th to end
        start = self.first_chunk.to(wide).expand(B, D)
        if state is not None:
            start = torch.where(state.position[:, None] < self.chunk_size, start, state.summary.to(wide))
        with no_autocast(x.device):
            logits = (
                F.linear(torch.cat([start[:, None], chunks.means], dim=1), self.gate.weight.to(wide)) / self.temperature
            )
        row = torch.where(position < self.chunk_size, 0, chunks.before[:, halo:])
        logits = logits.gather(1, row[..., None].expand(B, T, self.num_experts)).flatten(0, 1)
        best = logits.topk(self.top_k, dim=-1)
        y = self.experts(x.reshape(-1, D), best.indices, best.values.softmax(-1)).view_as(x)
        if state is not None:
            means = torch.cat([state.summary[:, None].to(wide), chunks.means], dim=1)
            newest = means.gather(1, chunks.total[:, None, None].expand(B, 1, D)).squeeze(1)
            state.summary.copy_(handed_on(newest))
            state.total.copy_(handed_on(chunks.rest))
            state.position.add_(T)
        return self._balance(y, logits, best.indices) if self.training else y

    def _balance(self, y: Tensor, logits: Tensor, indices: Tensor) -> Tensor:
        counts = counted_by_all(group_counts(indices, self.num_experts))
        if self.aux_coef:
            y = add_auxiliary_loss(y, self.aux_coef * balance_loss(logits.softmax(-1), counts))
        if recording(self):
            self.metrics = load_metrics(counts)
        return y

    def forward_flops(self, batch_size: int, seq_len: int, context_len: int = 0, streaming: bool = False) -> int:
        routes = batch_size * (max_finished(seq_len, self.chunk_size, streaming) + 1)
        return 2 * routes * self.dim * self.num_experts + self.experts.flops(batch_size * seq_len * self.top_k)

    def useful_flops(self, batch_size: int, seq_len: int, context_len: int = 0) -> int:
        begun = -(-(context_len + seq_len) // self.chunk_size) - -(-context_len // self.chunk_size)
        routing = 2 * batch_size * begun * self.dim * self.num_experts
        return routing + self.experts.flops(batch_size * seq_len * self.top_k)

    def vector_flops(self, batch_size: int, seq_len: int, context_len: int = 0) -> int:
        tokens = batch_size * seq_len
        return tokens * (self.dim + work.SOFTMAX * self.top_k) + self.experts.vector_flops(tokens * self.top_k)

    def product_elements(self, batch_size: int, seq_len: int) -> int:
        return batch_size * seq_len * self.top_k * (2 * self.hidden_dim + self.dim)

    def state_bytes(self, batch_size: int, max_len: int) -> int:
        return batch_size * (2 * self.dim * state_dtype(self.gate.weight.dtype).itemsize + 8)

    def activation_elements(self, batch_size: int, seq_len: int) -> int:
        # what chooses for each token, its experts, their logits and weights; means of chunks, and their logits
        choice = 4 + 3 * self.top_k + (self.num_experts if self.aux_coef else 0)
        chunks = 1 + max_finished(seq_len, self.chunk_size, False)
        kept = batch_size * (seq_len * choice + chunks * (self.dim + self.num_experts))
        return kept + self.experts.activation_elements(batch_size * seq_len * self.top_k)

    def active_params(self) -> int:
        return super().active_params() - (self.num_experts - self.top_k) * self.experts.params_per_expert

    def cost(self, batch_size: int, seq_len: int, context_len: int = 0, mode: Mode = "train") -> Cost:
        """As every block's; few chunks read few experts."""
        cost = super().cost(batch_size, seq_len, context_len, mode)
        chunks = batch_size * (-(-(context_len + seq_len) // self.chunk_size) - context_len // self.chunk_size)
        idle, passes = self.experts.idle(chunks, self.top_k), 3 if mode == "train" else 1
        saved = passes * round(idle * self.experts.params_per_expert) * self.itemsize
        return cost.replace(bytes_read=cost.bytes_read - saved, groups=self.num_experts - idle)

    @property
    def expectation(self) -> str:
        return "chunk_moe: chunks choose experts evenly"

    def parallel_plan(self) -> ParallelPlan:
        return ParallelPlan(
            {"gate": "replicate", "first_chunk": "replicate", "experts": "expert"},
            units=self.num_experts,
            context="halo",
            reason="a token goes where the chunk before it says",
        )


def _reaching_back(
    part: Slice, x: Tensor, position: Tensor, chunk_size: int, doc_ids: Tensor | None, halo: int
) -> tuple[Tensor, Tensor, int, Tensor]:
    """Arguments of `finished_chunks` for a slice and `halo` tokens before it."""
    ids = joined(part, torch.zeros_like(position) if doc_ids is None else doc_ids, halo)
    x, position = (torch.cat([before(part, t, halo), t], 1) for t in (x, position))
    return x, position, chunk_size, ids
