"""RAT: a recurrence inside chunks, softmax attention across them. Wei et al. 2025, arXiv:2507.04416.

g_t = sigmoid(W_g u_t + b)
[x~ | k~]_t = g_t * [x~ | k~]_{t-1} + (1 - g_t) * [x | k]_t,   from zero at each chunk's start
o_t = softmax over { k~ at the end of each earlier chunk, k~_t } of q_t . k~ / sqrt(d), times the x~ there
y_t = W_o (sigmoid(z_t) * o_t)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.blocks.chunks import max_finished, max_read
from zoo.blocks.grafting import take
from zoo.blocks.kv_cache import FIRST_CAPACITY, check_max_len, exact_size, segment_index
from zoo.blocks.recurrent import default_heads, previous, wide
from zoo.contract import (
    Block,
    ParallelPlan,
    State,
    counter,
    init_linear_,
    linear_flops,
    positions_from,
    refuse_packed_streaming,
    state_dtype,
)
from zoo.kernels import work
from zoo.kernels.attention import attention, attention_flops
from zoo.kernels.diagonal_scan import diagonal_scan
from zoo.kernels.dispatch import check_backend
from zoo.kernels.linear import Linear
from zoo.kernels.merge_lse import kept as merge_kept
from zoo.kernels.merge_lse import merge_lse
from zoo.kernels.rope import rope
from zoo.registry import register
from zoo.schema import PositiveFloat, PositiveInt
from zoo.segments import handed_on


@dataclass
class RATState(State):
    """k, v: [B, slots, H, d], rotated k~ and x~ at the end of chunk n in slot n (the open chunk's slot is scratch);
    running: [B, 2, D], x~ and k~ of the newest token in fp32; length: [B] int64."""

    k: Tensor
    v: Tensor
    running: Tensor
    length: Tensor
    chunk_size: int
    max_len: int | None = None
    size: int = counter()

    def reserve(self, new: int) -> None:
        """Make room for `new` tokens a row."""
        if self.max_len is not None and self.size + new > self.max_len:
            self.size = exact_size(self.length)
            check_max_len(self.size, new, self.max_len)
        self.size += new
        slots = needed = self.k.shape[1]
        while needed <= self.size // self.chunk_size:
            needed *= 2
        if needed > slots:
            self.k, self.v = (F.pad(x, (0, 0, 0, 0, 0, needed - slots)) for x in (self.k, self.v))

    def finished(self, before: int) -> tuple[Tensor, Tensor, Tensor]:
        """k, v and order index of the last token (-1: none) of the chunks among the first `before` tokens."""
        n = before // self.chunk_size
        end = (torch.arange(n, device=self.length.device) + 1) * self.chunk_size - 1
        return self.k[:, :n], self.v[:, :n], torch.where(end < self.length[:, None], end, -1)


@register(
    "rat",
    kind="mixer",
    paper="arXiv:2507.04416",
    ops=("attention", "diagonal_scan", "merge_lse", "rope"),
    state_growth="linear",
    relations=(
        "rat(num_heads=1, num_groups=1, chunk_size=1) == attention(num_heads=1, output_gate=True) at "
        "gate_bias=-inf, in_proj.weight[:64]=q_proj.weight[64:], in_proj.weight[64:128]=v_proj.weight, "
        "in_proj.weight[192:256]=q_proj.weight[:64], in_proj.weight[256:]=k_proj.weight, "
        "out_proj.weight=o_proj.weight",
    ),
    examples=(
        {"num_heads": 4, "chunk_size": 16},
        {"num_heads": 4, "num_groups": 4, "chunk_size": 5},
        {"num_heads": 2, "num_groups": 1, "chunk_size": 1},
    ),
)
class RAT(Block):
    """A gated linear recurrence over keys and values in each chunk, attention to the ends of earlier chunks.

    [x~|k~]_t = g_t [x~|k~]_{t-1} + (1 - g_t) [x|k]_t from zero in each chunk of L = chunk_size tokens; query t
    attends, in one softmax, to [x~|k~] at the end of each earlier chunk and at t itself; y = W_o (sigmoid(z) o).
    q and k~ are rotated by their chunk's index. q and k are made for num_groups heads, head h uses those of
    group h mod num_groups. Rows of in_proj: z, x, g, then q and k. x: [B, T, D] -> y: [B, T, D].
    Chunks are counted from each document's start; the released code needs T to be a multiple of L, this does not.
    2 D T^2 / L FLOPs of attention (half of it useful); state: 2 D numbers a chunk, and 2 D that run.
    L = 1 with g = 0 is softmax attention under an output gate, L >= T a gated linear RNN.
    Useful: 4 D FLOPs for each earlier chunk of a token; the rest is elementwise.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: PositiveInt | None = None,
        num_groups: PositiveInt = 2,
        chunk_size: PositiveInt = 16,
        rope_base: PositiveFloat = 10000.0,
        kernel: str = "auto",
        device=None,
        dtype=None,
    ):
        super().__init__(dim)
        check_backend("attention", kernel)
        self.num_heads, self.num_groups = num_heads or default_heads(dim), num_groups
        self.head_dim = dim // self.num_heads
        if dim % self.num_heads or self.num_heads % num_groups:
            raise ValueError(f"num_heads={self.num_heads} must divide dim={dim} and be a multiple of {num_groups=}")
        if self.head_dim % 2:
            raise ValueError(f"dim / num_heads = {self.head_dim} must be even to be rotated: change num_heads")
        self.chunk_size, self.rope_base, self.kernel = chunk_size, rope_base, kernel
        factory = {"device": device, "dtype": dtype}
        self.rows = [dim, dim, dim, *[num_groups * self.head_dim] * 2]
        self.in_proj = Linear(dim, sum(self.rows), bias=False, **factory)
        self.gate_bias = nn.Parameter(torch.empty(dim, **factory))
        self.out_proj = Linear(dim, dim, bias=False, **factory)

    @staticmethod
    def like_attention(dim: int, num_heads: int, num_kv_heads: int, head_dim: int) -> dict[str, Any]:
        """Queries and keys of its own for each head."""
        return {"num_groups": num_heads}

    @torch.no_grad()
    def from_attention(self, q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> tuple[str, ...]:
        """Take the maps of attention, each with the rows of all heads. The output gate starts as 1/2, which W_o makes
        up for. Where every token is a chunk nothing runs, and the layer is the attention that it replaces."""
        z, value, gate, queries, keys = self.in_proj.weight.split(self.rows)
        for rows in (z, gate):
            rows.zero_()
        if self.chunk_size == 1:
            self.gate_bias.fill_(-30.0)
        return take(
            ("in_proj.weight", value, v), ("in_proj.weight", queries, q), ("in_proj.weight", keys, k),
            ("out_proj.weight", self.out_proj.weight, 2 * o),
        )  # fmt: skip

    def reset_parameters(self) -> None:
        init_linear_(self.in_proj)
        init_linear_(self.out_proj)
        nn.init.uniform_(self.gate_bias, 1, max(self.chunk_size - 1, 1))  # memories of 1 to L - 1 tokens
        with torch.no_grad():
            self.gate_bias.log_()

    def forward(
        self,
        x: Tensor,
        *,
        state: RATState | None = None,
        positions: Tensor | None = None,
        doc_ids: Tensor | None = None,
    ) -> Tensor:
        refuse_packed_streaming(state, doc_ids)
        B, T, _ = x.shape
        L, heads = self.chunk_size, (self.num_heads, self.head_dim)
        order = positions_from(doc_ids, B, T, x.device) if state is None else segment_index(state.length, T)
        z, value, gate, q, k = self.in_proj(x).split(self.rows, -1)
        q, k = (h.repeat(1, 1, self.num_heads // self.num_groups) for h in (q, k))
        value, k = self._recur(value, k, gate, order % L == 0, state)
        positions = (order if positions is None else positions) // L
        q, k = (rope(h.unflatten(-1, heads), positions, base=self.rope_base) for h in (q, k))
        value = value.unflatten(-1, heads)
        o = self._attend(q, k, value, order, state, doc_ids)
        return self.out_proj(z.sigmoid() * o.to(x.dtype).flatten(2))

    def _recur(
        self, value: Tensor, k: Tensor, gate: Tensor, starts: Tensor, state: RATState | None
    ) -> tuple[Tensor, Tensor]:
        """x~ and k~ [B, T, D] in fp32."""
        gate = wide(gate) + wide(self.gate_bias)
        inputs = torch.stack([wide(value), wide(k)], 2) * (-gate).sigmoid().unsqueeze(2)
        log_decay = F.logsigmoid(gate).masked_fill(starts[..., None], float("-inf")).unsqueeze(2)
        initial = None if state is None else previous(state.running)
        h, last = diagonal_scan(log_decay, inputs, initial_state=initial)
        if state is not None:
            state.running.copy_(handed_on(last))
        return h[:, :, 0], h[:, :, 1]

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, order: Tensor, state: RATState | None, doc_ids: Tensor | None
    ) -> Tensor:
        (B, T), L = order.shape, self.chunk_size
        # the tokens that end a chunk, in order; what else the sort puts among the first is no key
        ends = order % L == L - 1
        at = (~ends).long().argsort(dim=1, stable=True)[:, : max_finished(T, L, state is not None)]
        row = torch.arange(B, device=q.device)[:, None]
        keys, values = k[row, at].to(q.dtype), v[row, at].to(q.dtype)
        index = order if state is not None else torch.arange(T, device=q.device).expand(B, T)
        key_index = torch.where(ends[row, at], index[row, at], -1)
        read = max_read(T, L, state is not None)
        seen = (keys[:, :read], values[:, :read], key_index[:, :read])
        if state is not None:
            before = state.size
            state.reserve(T)
            past = state.finished(before)
            seen = tuple(torch.cat([old.to(new.dtype), new], 1) for old, new in zip(past, seen))
            state.length.add_(T)
            slot = torch.where(key_index >= 0, key_index, state.length[:, None]) // L
            state.k.index_put_((row, slot), handed_on(keys).to(state.k.dtype))
            state.v.index_put_((row, slot), handed_on(values).to(state.v.dtype))
        if seen[0].shape[1] == 0:
            return v
        o, lse = attention(
            q, seen[0], seen[1], q_index=index - order % L - 1, k_index=seen[2], q_doc_ids=doc_ids,
            k_doc_ids=None if doc_ids is None else doc_ids[row, at[:, :read]], need_lse=True, backend=self.kernel,
        )  # fmt: skip
        assert lse is not None
        own = (wide(q) * k).sum(-1) * self.head_dim**-0.5
        return merge_lse([o, v.to(o.dtype)], [lse, own.to(lse.dtype)])[0]

    def init_state(self, batch_size: int, max_len: int | None = None) -> RATState:
        like = self.reference_parameter.detach()
        slots = (FIRST_CAPACITY if max_len is None else max_len) // self.chunk_size + 1
        k, v = (like.new_zeros(batch_size, slots, self.num_heads, self.head_dim) for _ in range(2))
        running = like.new_zeros(batch_size, 2, self.dim, dtype=state_dtype(like.dtype))
        length = torch.zeros(batch_size, dtype=torch.int64, device=like.device)
        return RATState(k, v, running, length, self.chunk_size, max_len)

    def forward_flops(self, batch_size: int, seq_len: int, context_len: int = 0, streaming: bool = False) -> int:
        keys = max_read(seq_len, self.chunk_size, streaming) + context_len // self.chunk_size * streaming
        flops = linear_flops(batch_size * seq_len, self.in_proj, self.out_proj)
        if keys == 0:
            return flops
        return flops + attention_flops(
            batch_size, seq_len, keys, self.num_heads, self.head_dim, plain=False, fused=False
        )

    def useful_flops(self, batch_size: int, seq_len: int, context_len: int = 0) -> int:
        keys = work.earlier_blocks(seq_len, context_len, self.chunk_size)
        attend = work.attention_work(self.num_heads, keys, self.head_dim, self.head_dim)
        return linear_flops(batch_size * seq_len, self.in_proj, self.out_proj) + batch_size * attend

    def vector_flops(self, batch_size: int, seq_len: int, context_len: int = 0) -> int:
        # forget gate and its complement; value and key, each scaled and summed; rotated q and k; the own chunk's score
        # and value, joined; the output gate
        token = self.dim * (2 * work.SIGMOID + 2 * 3 + 2 * work.ROPE + 2 + 3 + work.SIGMOID + 1)
        keys = work.earlier_blocks(seq_len, context_len, self.chunk_size) + seq_len
        return batch_size * (seq_len * token + work.SOFTMAX * self.num_heads * keys)

    def state_bytes(self, batch_size: int, max_len: int) -> int:
        slots = max_len // self.chunk_size + 1
        return batch_size * (2 * self.dim * (slots * self.itemsize + max(self.itemsize, 4)) + 8)

    def activation_elements(self, batch_size: int, seq_len: int) -> int:
        # x; the gate, its sigmoid and logsigmoid; x and k before the scan; decays of both, results; q and k rotated,
        # cos and sin for both; o; what merging it with the own x keeps, y, gate and product; where chunks end, and
        # their keys and values
        ends = max_read(seq_len, self.chunk_size, False)
        token = 17 * self.dim + 2 * self.head_dim + self.num_heads + merge_kept(2, self.num_heads, self.head_dim) + 4
        return batch_size * (seq_len * token + ends * 2 * self.dim)

    def parallel_plan(self) -> ParallelPlan:
        return ParallelPlan(context="gather_input", reason="in_proj also makes the q and k that all heads share")
