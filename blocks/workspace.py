"""Workspace memory: a few slots per sequence that finished chunks write and later tokens read (after Hydra,
arXiv:2508.15099, with a causal rule: tokens of chunk c read M_{c-1}, and M_c = f(M_{c-1}, mean of chunk c)).

Keys of slots: k_s = W_k rms(M_s) in R^rank.
Read:  y_t = sigmoid(w_g x_t + b) sum_s softmax_s(W_q x_t . k_s / sqrt(rank)) M_s.
Write: m = mean of the chunk; (keep, write) = softmax(W_c m); the `active` slots of smallest norm become
       keep M_s + write (0.9 M_s + 0.1 W_u (sigmoid(k_s) * W_d m)); the others stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.blocks.chunks import finished_chunks, max_finished, max_read
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
from zoo.kernels.linear import Linear
from zoo.kernels.precision import no_autocast
from zoo.registry import register
from zoo.schema import PositiveInt
from zoo.segments import handed_on

WRITE_RATE = 0.1


@dataclass
class WorkspaceState(State):
    """memory: [B, S, D] after the last finished chunk (unused before the first ends); total: [B, D], sum over the
    unfinished chunk; position: [B] int64."""

    memory: Tensor
    total: Tensor
    position: Tensor


def read(query: Tensor, keys: Tensor, memory: Tensor) -> Tensor:
    """query: [B, n, r], keys: [B, S, r], memory: [B, S, D] -> [B, n, D]; softmax over the slots."""
    scores = torch.bmm(query.to(keys.dtype), keys.transpose(1, 2)) * query.shape[-1] ** -0.5
    return torch.bmm(scores.softmax(-1), memory)


@register(
    "workspace",
    kind="memory",
    paper="arXiv:2508.15099",
    state_growth="constant",
    examples=(
        {"slots": 8, "active": 4, "rank": 8, "chunk_size": 16},
        {"slots": 6, "active": 6, "rank": 16, "chunk_size": 5, "gate_bias": 0.0},
    ),
)
class WorkspaceMemory(Block):
    """Workspace memory: tokens of chunk c attend to slots M_{c-1}; M_c = write(M_{c-1}, mean of chunk c).

    y_t = sigmoid(w x_t + b) sum_s softmax(q_t . k_s / sqrt(rank)) M_s with q = W_q x and k_s = W_k rms(M_s). A
    finished chunk of chunk_size tokens moves the `active` slots of smallest norm by a tenth towards a proposal of
    rank `rank`, as far as a keep/write softmax of the chunk's mean says. Slots start from learned vectors at each
    document's start and belong to one sequence and one place in the network. fp32 slots.

    x: [B, T, D] -> y: [B, T, D]; state [B, slots, D], the open chunk's sum, position: independent of T.
    Parameters slots D + 4 D rank + 3 D + 3. T / chunk_size sequential steps over [B, slots, D]; 4 slots D rank
    FLOPs a chunk and 2 slots (D + rank) a token; streaming does a step's arithmetic in every call, so that shapes
    stay fixed. Before the first chunk ends it is attention over `slots` learned vectors.
    Useful: 2 slots (D + rank) FLOPs a token, and a write for each chunk that ends.
    """

    def __init__(
        self,
        dim: int,
        *,
        slots: PositiveInt = 64,
        active: PositiveInt = 32,
        rank: PositiveInt = 128,
        chunk_size: PositiveInt = 32,
        gate_bias: float = -2.0,
        device=None,
        dtype=None,
    ):
        super().__init__(dim)
        if active > slots:
            raise ValueError(f"active={active} is more than slots={slots}; lower active")
        self.num_slots, self.active, self.rank = slots, active, rank
        self.chunk_size, self.gate_bias = chunk_size, gate_bias
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.slots = nn.Parameter(torch.empty(slots, dim, **factory))
        self.q_proj = Linear(dim, rank, bias=False, **factory)
        self.k_proj = Linear(dim, rank, bias=False, **factory)
        self.write_down = Linear(dim, rank, bias=False, **factory)
        self.write_up = Linear(rank, dim, bias=False, **factory)
        self.controller = Linear(dim, 2, **factory)
        self.gate_proj = Linear(dim, 1, **factory)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.slots, std=0.02)
        for linear in (self.q_proj, self.k_proj, self.write_down, self.write_up, self.controller):
            init_linear_(linear)
        nn.init.zeros_(self.gate_proj.weight)
        nn.init.constant_(self.gate_proj.bias, self.gate_bias)

    def init_state(self, batch_size: int, max_len: int | None = None) -> WorkspaceState:
        options = {"dtype": state_dtype(self.slots.dtype), "device": self.slots.device}
        return WorkspaceState(
            memory=torch.zeros(batch_size, self.num_slots, self.dim, **options),
            total=torch.zeros(batch_size, self.dim, **options),
            position=torch.zeros(batch_size, dtype=torch.int64, device=self.slots.device),
        )

    def forward(
        self,
        x: Tensor,
        *,
        state: WorkspaceState | None = None,
        positions: Tensor | None = None,
        doc_ids: Tensor | None = None,
    ) -> Tensor:
        refuse_packed_streaming(state, doc_ids)
        B, T, D = x.shape
        C, streaming = self.chunk_size, state is not None
        position = positions_from(doc_ids, B, T, x.device)
        if state is not None:
            position = position + state.position[:, None]
        chunks = finished_chunks(x, position, C, doc_ids, None if state is None else state.total)
        start = self.slots.to(chunks.means.dtype).expand(B, -1, -1)
        if state is not None:
            start = torch.where(state.position[:, None, None] < C, start, state.memory)
        R = max_read(T, C, streaming)
        steps = max_finished(T, C, streaming) if streaming else R  # a last write that nobody reads is left out
        first = chunks.first if doc_ids is not None else None
        version = torch.where(position < C, 0, chunks.before)  # which memory a token reads
        query = self.q_proj(x)
        head = T if doc_ids is not None else min(T, C)  # only these can read version 0
        with no_autocast(x.device):
            memories, keys = self._write(start, chunks.means[:, :steps], first, R)
            y = read(query[:, :head], keys[0], memories[0])
            if head < T:
                y = F.pad(y, (0, 0, 0, T - head))
            if R:
                y = self._read_later(query, y, version, position % C, keys[1 : R + 1], memories[1 : R + 1])
        if state is not None:
            last = chunks.total[:, None, None, None].expand(B, 1, self.num_slots, D)
            state.memory.copy_(handed_on(torch.stack(memories, 1).gather(1, last).squeeze(1)))
            state.total.copy_(handed_on(chunks.rest))
            state.position.add_(T)
        return torch.sigmoid(self.gate_proj(x)) * y.to(x.dtype)

    def _keys(self, memory: Tensor) -> Tensor:
        normed = memory * torch.rsqrt(memory.square().mean(-1, keepdim=True) + 1e-6)
        return F.linear(normed, self.k_proj.weight.to(memory.dtype))

    def _write(
        self, start: Tensor, means: Tensor, first: Tensor | None, read_up_to: int
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Memories before and after each chunk of `means` [B, J, D], and the keys of those that are used."""
        wide, D = start.dtype, self.dim
        down = F.linear(means, self.write_down.weight.to(wide)).unbind(1)
        amount = F.linear(means, self.controller.weight.to(wide), self.controller.bias.to(wide)).softmax(-1)[..., 1]
        amounts = WRITE_RATE * amount[..., None, None]
        up = self.write_up.weight.to(wide)
        memories, keys = [start], [self._keys(start)]
        for j, (low, share) in enumerate(zip(down, amounts.unbind(1), strict=True)):
            old, key = memories[-1], keys[-1]
            if first is not None:
                restart = first[:, j, None, None]
                old, key = torch.where(restart, start, old), torch.where(restart, keys[0], key)
            weakest = old.square().sum(-1).topk(self.active, dim=-1, largest=False).indices[..., None]
            chosen = old.gather(1, weakest.expand(-1, -1, D))
            proposal = F.linear(key.gather(1, weakest.expand(-1, -1, self.rank)).sigmoid() * low[:, None], up)
            memories.append(old.scatter(1, weakest.expand(-1, -1, D), chosen + share * (proposal - chosen)))
            if len(keys) <= max(read_up_to, len(down) - 1):
                keys.append(self._keys(memories[-1]))
        return memories, keys

    def _read_later(
        self, query: Tensor, y: Tensor, version: Tensor, offset: Tensor, keys: list[Tensor], memories: list[Tensor]
    ) -> Tensor:
        """Reads of the memories after the first, put over y where a token reads one. At most chunk_size tokens
        read each, so tokens are laid out as [memory, place in chunk] and one product serves them all."""
        B, D = y.shape[0], y.shape[2]
        C, R = self.chunk_size, len(memories)
        place = torch.where(version > 0, (version - 1) * C + offset, R * C)[..., None]  # R C: nowhere
        laid = query.new_zeros(B, R * C + 1, self.rank).scatter(1, place.expand(-1, -1, self.rank), query)
        out = read(
            laid[:, : R * C].reshape(B * R, C, self.rank),
            torch.stack(keys, 1).flatten(0, 1),
            torch.stack(memories, 1).flatten(0, 1),
        )
        out = out.view(B, R * C, D).gather(1, place.clamp(max=R * C - 1).expand(-1, -1, D))
        return torch.where(version[..., None] > 0, out, y)

    def forward_flops(self, batch_size: int, seq_len: int, context_len: int = 0, streaming: bool = False) -> int:
        C, D, rank = self.chunk_size, self.dim, self.rank
        later = max_read(seq_len, C, streaming)
        steps = max_finished(seq_len, C, streaming) if streaming else later
        tokens = linear_flops(batch_size * seq_len, self.q_proj, self.gate_proj)
        reads = 2 * batch_size * self.num_slots * (rank + D) * (min(seq_len, C) + later * C)
        keys = 2 * batch_size * self.num_slots * D * rank * max(later + 1, steps)
        writes = linear_flops(batch_size * steps, self.write_down, self.controller)
        return tokens + reads + keys + writes + linear_flops(batch_size * steps * self.active, self.write_up)

    def useful_flops(self, batch_size: int, seq_len: int, context_len: int = 0) -> int:
        C, D, rank, slots = self.chunk_size, self.dim, self.rank, self.num_slots
        steps = (context_len + seq_len) // C - context_len // C
        tokens = linear_flops(batch_size * seq_len, self.q_proj, self.gate_proj)
        reads = 2 * batch_size * seq_len * slots * (rank + D)
        keys = 2 * batch_size * slots * D * rank * (steps + (context_len == 0))
        writes = linear_flops(batch_size * steps, self.write_down, self.controller)
        writes += linear_flops(batch_size * steps * self.active, self.write_up)
        # in a stateless pass nobody reads what the last chunk writes
        return min(
            tokens + reads + keys + writes, self.forward_flops(batch_size, seq_len, context_len, context_len > 0)
        )

    def vector_flops(self, batch_size: int, seq_len: int, context_len: int = 0) -> int:
        steps = (context_len + seq_len) // self.chunk_size - context_len // self.chunk_size
        token = work.SOFTMAX * self.num_slots + 2 * self.dim + work.SIGMOID  # the chunk's mean, the gate
        step = self.num_slots * self.dim * (2 + 3) + 4 * self.active * self.dim  # lengths, norms; slots moved
        return batch_size * (seq_len * token + steps * step)

    def state_bytes(self, batch_size: int, max_len: int) -> int:
        return batch_size * ((self.num_slots + 1) * self.dim * state_dtype(self.slots.dtype).itemsize + 8)

    def activation_elements(self, batch_size: int, seq_len: int) -> int:
        S, D, C, R = self.num_slots, self.dim, self.chunk_size, max_read(seq_len, self.chunk_size, False)
        # a token: x, y, its query, its gate; where it is summed up, laid out and found
        token = 2 * D + self.rank + 8
        # laid out by memories: queries, softmax, what is read (the first memory is read by all that are first)
        reads = R * C * (D + S + self.rank) + C * S
        # a memory: normed, and again in the stack with its keys; a write: the mean, what is drawn from it, the slots it
        # goes to, gates, what it changes, and the memory after it
        memory = S * (D + 1)
        write = D * (1 + (seq_len % C == 0)) + self.rank + 3 + self.active * (D + 2 * self.rank + 2)
        return batch_size * (seq_len * token + reads + (R + 1) * memory + R * (write + 2 * S * (D + self.rank)))

    def parallel_plan(self) -> ParallelPlan:
        names = ("slots", "q_proj", "k_proj", "write_down", "write_up", "controller", "gate_proj")
        return ParallelPlan(
            dict.fromkeys(names, "replicate"), context="gather_input", reason="chunks write one after the other"
        )
