"""SeerAttention: a small gate learns from dense attention which blocks of keys each group of heads should read.
Gao et al. 2024, arXiv:2410.13276; the gate of single queries: SeerAttention-R 2025, arXiv:2506.08889.

    qg_t = RoPE(sum_h W_q,h q_t,h)                            over the heads of a group, un-rotated queries
    kg_c = RoPE(W_k [max ; min ; mean of the keys of block c]) un-rotated keys, at the block's first token
    S(t) = {own block} + the top_k - 1 complete blocks before t with the largest qg_t . kg_c
    L    = mean KL(a_t || softmax_c(qg_t . kg_c / sqrt(Dg))),  a_tc ~ max_h max_{j in c} p_tj,h of dense attention
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.blocks.compression import write_slots
from zoo.blocks.heads import grouped_heads
from zoo.blocks.kv_cache import KVCache, kv_cache_bytes, segment_index
from zoo.blocks.measure import recording
from zoo.contract import (
    Block,
    ParallelPlan,
    State,
    add_auxiliary_loss,
    init_linear_,
    linear_flops,
    positions_from,
    refuse_packed_streaming,
    state_dtype,
)
from zoo.kernels import sparse_attention as attending
from zoo.kernels import work
from zoo.kernels.attention import QUERY_TILE, attention, attention_flops
from zoo.kernels.block_list import BlockList, sort_ids
from zoo.kernels.dispatch import check_backend
from zoo.kernels.linear import Linear
from zoo.kernels.pool_blocks.chunked import block_starts
from zoo.kernels.precision import no_autocast
from zoo.kernels.rope import rope
from zoo.kernels.select import select
from zoo.kernels.sparse_attention import sparse_attention
from zoo.registry import register
from zoo.schema import NonNegativeFloat, PositiveFloat, PositiveInt


@dataclass
class SeerState(State):
    """The key-value cache, the gate's key of every block [B, slots, Hkv, gate_dim], and the un-rotated keys
    [B, block_size, Hkv, D] of the block that is being filled."""

    cache: KVCache
    gate_keys: Tensor
    tail: Tensor


@register(
    "seer_attention",
    kind="mixer",
    paper="arXiv:2506.08889",
    ops=("attention", "sparse_attention", "select", "rope"),
    state_growth="linear",
    relations=(
        "seer_attention() == attention()",
        "seer_attention(num_heads=4, num_kv_heads=2, block_size=64, top_k=2) == attention(num_heads=4, num_kv_heads=2)",
    ),
    examples=(
        {"num_heads": 4, "num_kv_heads": 2, "block_size": 16, "top_k": 2, "gate_dim": 10},
        {"num_heads": 2, "block_size": 8, "top_k": 3, "gate_dim": 8, "rope": False},
        {"num_heads": 2, "block_size": 16, "top_k": 99},
    ),
)
class SeerAttention(Block):
    """Attention of each group of heads to its own block and the top_k - 1 earlier ones that a learned gate prefers.

    g_tc = qg_t . kg_c over complete blocks c before t: one query of gate_dim channels a group, the sum of a projection
    of each of its heads, and one key a block from the maximum, minimum and mean of its keys; both from q and k before
    rotation, then rotated by their place in the document. The own block is one of the top_k; ties go to the earliest.
    In training KL(block maxima of dense attention, the most over the group, normalised || softmax(g / sqrt(gate_dim)))
    over those blocks, times gate_coef, is added to the loss; its inputs are detached, so it teaches the gate alone, and
    the gate learns from nothing else. Distil as the paper does with top_k * block_size >= T (dense attention) and all
    else frozen. That loss takes T^2 work, a tile of queries at a time, and is not in the cost.
    This is the gate of SeerAttention-R; the first paper's also pools queries over blocks, which is not causal.
    x: [B, T, D] -> y: [B, T, D]. T^2 / block_size work for the gate, T top_k block_size for attention. State: KV cache,
    one gate key a block, a block of keys. A sequence of at most top_k blocks is attention.
    Useful: 4 H d FLOPs for each key that is read, 2 gate_dim a group for each past block, 2 H d gate_dim a
    token and 6 G d gate_dim a block to make the gate's queries and keys.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: PositiveInt | None = None,
        num_kv_heads: PositiveInt | None = None,
        head_dim: PositiveInt | None = None,
        block_size: PositiveInt = 64,
        top_k: PositiveInt = 64,
        gate_dim: PositiveInt = 128,
        gate_coef: NonNegativeFloat = 1.0,
        rope: bool = True,
        rope_base: PositiveFloat = 10000.0,
        kernel: str = "auto",
        device=None,
        dtype=None,
    ):
        super().__init__(dim)
        self.num_heads, self.num_kv_heads, self.head_dim = grouped_heads(dim, num_heads, num_kv_heads, head_dim)
        if rope and (self.head_dim % 2 or gate_dim % 2):
            raise ValueError(f"head_dim={self.head_dim} and gate_dim={gate_dim} must be even, or give rope: false")
        check_backend("sparse_attention", kernel)
        self.block_size, self.top_k, self.kernel = block_size, top_k, kernel
        self.gate_dim, self.gate_coef = gate_dim, gate_coef
        self.rope_base = rope_base if rope else None
        factory = {"device": device, "dtype": dtype}
        q_width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q_proj = Linear(dim, q_width, bias=False, **factory)
        self.k_proj = Linear(dim, kv_width, bias=False, **factory)
        self.v_proj = Linear(dim, kv_width, bias=False, **factory)
        self.o_proj = Linear(q_width, dim, bias=False, **factory)
        self.gate_q = nn.Parameter(torch.empty(self.num_kv_heads, q_width // self.num_kv_heads, gate_dim, **factory))
        self.gate_k = nn.Parameter(torch.empty(self.num_kv_heads, 3 * self.head_dim, gate_dim, **factory))
        self.metrics: dict[str, Tensor] = {}

    def reset_parameters(self) -> None:
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            init_linear_(linear)
        for weight in (self.gate_q, self.gate_k):
            for head in weight.unbind(0):
                nn.init.xavier_uniform_(head)

    def init_state(self, batch_size: int, max_len: int | None = None) -> SeerState:
        like, heads = self.reference_parameter.detach(), self.num_kv_heads
        cache = KVCache.create(batch_size, max_len, heads, self.head_dim, like=like)
        gate_keys = like.new_zeros(batch_size, -(-cache.k.shape[1] // self.block_size), heads, self.gate_dim)
        return SeerState(cache, gate_keys, like.new_zeros(batch_size, self.block_size, heads, self.head_dim))

    def forward(
        self,
        x: Tensor,
        *,
        state: SeerState | None = None,
        positions: Tensor | None = None,
        doc_ids: Tensor | None = None,
    ) -> Tensor:
        refuse_packed_streaming(state, doc_ids)
        B, T, _ = x.shape
        place = positions_from(doc_ids, B, T, x.device) if state is None else segment_index(state.cache.length, T)
        flat_q, flat_k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = flat_q, flat_k
        if self.rope_base is not None:
            q, k = (rope(h, place if positions is None else positions, base=self.rope_base) for h in (q, k))
        index = place if doc_ids is None else torch.arange(T, device=x.device).expand(B, T)
        k_index, context = index, 0
        if state is not None:
            context = state.cache.size
            k, v, k_index, _ = state.cache.append(k, v)
        learn = self.training and torch.is_grad_enabled() and self.gate_coef > 0
        choose = context + T > self.top_k * self.block_size
        own = index - place % self.block_size  # first token of the own block
        gated = None
        if choose or learn or state is not None:
            gate_keys, first = self._gate_keys(flat_k.detach(), state, place, doc_ids)
            if choose or learn:
                gated = self._gate(flat_q.detach(), gate_keys, place), first, self._earlier(first, own, doc_ids)
        masks = {"q_index": index, "k_index": k_index, "q_doc_ids": doc_ids, "k_doc_ids": doc_ids}
        if choose and gated is not None:
            blocks = self._blocks(*gated, own, doc_ids)
            o, _ = sparse_attention(q, k, v, blocks, **masks, backend=self.kernel)
        else:
            order = {} if context else {"q_index": None, "k_index": None}
            o, _ = attention(q, k, v, **{**masks, **order})
        y = self.o_proj(o.flatten(2))
        if not learn or gated is None:
            return y
        gate, first, earlier = gated
        with torch.no_grad():
            target = self._target(q, k, first, earlier, **masks)
        hidden = torch.finfo(gate.dtype).min  # finite: tokens of a first block see none
        log_share = gate.masked_fill(~earlier[:, None], hidden).log_softmax(-1)
        loss = F.kl_div(log_share, target, reduction="sum") / target[..., 0].numel()
        if recording(self):
            self.metrics = {"gate_kl": loss.detach()}
        return add_auxiliary_loss(y, self.gate_coef * loss)

    def _gate_keys(
        self, k: Tensor, state: SeerState | None, place: Tensor, doc_ids: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Gate keys [B, N, Hkv, gate_dim] of all blocks and the first token of each [B, N], -1 where there is none."""
        B, T, size = *k.shape[:2], self.block_size
        inside = torch.arange(size, device=k.device)
        row = torch.arange(B, device=k.device)[:, None, None]
        if state is None:
            first = block_starts(T, size, doc_ids, k)
            token = first.clamp(min=0)[..., None] + inside
            at = place.gather(1, first.clamp(min=0))
            return self._compress(k[row, token.clamp(max=T - 1)], at), first
        # blocks that the new tokens may complete; one that stays incomplete is written again later
        length = place[:, :1]
        slots = length // size + torch.arange(-(-T // size), device=k.device)
        new = slots[..., None] * size + inside - length[..., None]
        source = torch.cat([state.tail.to(k.dtype), k], 1)
        source = source[row, torch.where(new < 0, inside, size + new.clamp(max=T - 1))]
        state.tail.index_put_((row[:, 0], place[:, -size:] % size), k[:, -size:].to(state.tail.dtype))
        missing = -(-state.cache.k.shape[1] // size) - state.gate_keys.shape[1]
        if missing > 0:
            state.gate_keys = F.pad(state.gate_keys, (0, 0, 0, 0, 0, missing))
        blocks = -(-state.cache.size // size)
        keys = write_slots(state.gate_keys, self._compress(source, slots * size), slots, blocks)
        return keys, (torch.arange(blocks, device=k.device) * size).expand(B, -1)

    def _compress(self, keys: Tensor, at: Tensor) -> Tensor:
        """Gate keys [B, N, Hkv, gate_dim] of blocks of keys [B, N, block_size, Hkv, D] that start at `at` [B, N]."""
        pooled = torch.cat([keys.amax(2), keys.amin(2), keys.mean(2)], -1)
        pooled = torch.einsum("bnhd,hdg->bnhg", pooled, self.gate_k)
        return pooled if self.rope_base is None else rope(pooled, at, base=self.rope_base)

    def _gate(self, q: Tensor, keys: Tensor, place: Tensor) -> Tensor:
        """Gate logits [B, Hkv, T, N] of un-rotated queries [B, T, Hq, D] and gate keys [B, N, Hkv, gate_dim]."""
        q = torch.einsum("bthd,hdg->bthg", q.flatten(2).unflatten(2, (self.gate_q.shape[0], -1)), self.gate_q)
        if self.rope_base is not None:
            q = rope(q, place, base=self.rope_base)
        wide = state_dtype(q.dtype)
        with no_autocast(q.device):
            return q.to(wide).transpose(1, 2) @ keys.to(wide).permute(0, 2, 3, 1) * self.gate_dim**-0.5

    def _earlier(self, first: Tensor, own: Tensor, doc_ids: Tensor | None) -> Tensor:
        """Which blocks, by their first tokens [B, N], end before the own one of each query [B, T]: [B, T, N]."""
        earlier = (first >= 0)[:, None] & (first[:, None] < own[..., None])
        if doc_ids is None:
            return earlier
        return earlier & (doc_ids.gather(1, first.clamp(min=0))[:, None] == doc_ids[..., None])

    def _blocks(self, gate: Tensor, first: Tensor, earlier: Tensor, own: Tensor, doc_ids: Tensor | None) -> BlockList:
        """The own block and the best earlier ones; in packed documents blocks are named by their first token."""
        best = select(gate, self.top_k - 1, visible=earlier[:, None]).idx
        start = first[:, None, None].expand(-1, *best.shape[1:3], -1).gather(-1, best.clamp(min=0).long())
        start = torch.where(best >= 0, start, -1)
        start = sort_ids(torch.cat([start, own[:, None, :, None].expand(-1, best.shape[1], -1, 1)], -1))
        if doc_ids is not None:
            return BlockList(start, kv_block=self.block_size, stride=1)
        return BlockList(start.div(self.block_size, rounding_mode="floor"), kv_block=self.block_size)

    def _target(
        self, q: Tensor, k: Tensor, first: Tensor, earlier: Tensor, q_index: Tensor, k_index: Tensor,
        q_doc_ids: Tensor | None, k_doc_ids: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Largest dense attention weight in each earlier block and group, normalised: [B, Hkv, T, N]."""
        (B, T, H, D), (S, groups) = q.shape, k.shape[1:3]
        wide = state_dtype(q.dtype)
        token = (first.clamp(min=0)[..., None] + torch.arange(self.block_size, device=q.device)).clamp(max=S - 1)
        keys = k.to(wide).permute(0, 2, 3, 1)
        targets = []
        for part in (slice(a, a + QUERY_TILE) for a in range(0, T, QUERY_TILE)):
            seen = (k_index >= 0)[:, None] & (k_index[:, None] <= q_index[:, part, None])
            if q_doc_ids is not None and k_doc_ids is not None:
                seen = seen & (k_doc_ids[:, None] == q_doc_ids[:, part, None])
            rows = q[:, part].to(wide).unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)
            with no_autocast(q.device):
                p = (rows @ keys).view(B, H, -1, S) * D**-0.5
            p = p.masked_fill(~seen[:, None], float("-inf")).softmax(-1)
            p = p.gather(-1, token.flatten(1)[:, None, None].expand(-1, *p.shape[1:3], -1))
            p = p.unflatten(-1, token.shape[1:]).amax(-1).unflatten(1, (groups, -1)).amax(2)
            targets.append(p * earlier[:, None, part])
        target = torch.cat(targets, 2)
        return target / target.sum(-1, keepdim=True).clamp(min=torch.finfo(wide).tiny)

    def forward_flops(self, batch_size: int, seq_len: int, context_len: int = 0, streaming: bool = False) -> int:
        B, T, Hq, Hkv, D = batch_size, seq_len, self.num_heads, self.num_kv_heads, self.head_dim
        keys = context_len + seq_len
        blocks = -(-keys // self.block_size)
        choose = keys > self.top_k * self.block_size
        flops = linear_flops(B * T, self.q_proj, self.k_proj, self.v_proj, self.o_proj)
        if choose or streaming:
            flops += 2 * B * -(-T // self.block_size) * self.gate_k.numel()
        if not choose:
            return flops + attention_flops(B, T, keys, Hq, D, plain=not context_len)
        flops += 2 * B * T * (self.gate_q.numel() + Hkv * blocks * self.gate_dim)
        slots = min(self.top_k - 1, blocks) + 1
        return flops + attending.flops(B, T, keys, Hq, Hkv, D, D, slots, self.block_size, Hkv)

    def useful_flops(self, batch_size: int, seq_len: int, context_len: int = 0) -> int:
        B, T, H, Hkv, D, size = batch_size, seq_len, self.num_heads, self.num_kv_heads, self.head_dim, self.block_size
        flops = linear_flops(B * T, self.q_proj, self.k_proj, self.v_proj, self.o_proj)
        flops += 4 * B * H * D * work.block_pairs(T, context_len, size, self.top_k)
        if context_len + T <= self.top_k * size:
            return flops
        blocks = (context_len + T) // size - context_len // size
        gate = T * self.gate_q.numel() + blocks * self.gate_k.numel()
        return flops + 2 * B * (gate + Hkv * self.gate_dim * work.earlier_blocks(T, context_len, size))

    def vector_flops(self, batch_size: int, seq_len: int, context_len: int = 0) -> int:
        H, Hkv, D = self.num_heads, self.num_kv_heads, self.head_dim
        token = 0 if self.rope_base is None else work.ROPE * (H + Hkv) * D
        if context_len + seq_len > self.top_k * self.block_size:
            token += 3 * Hkv * D  # largest, least and mean key of a block
            token += 0 if self.rope_base is None else work.ROPE * Hkv * self.gate_dim
        scores = H * work.block_pairs(seq_len, context_len, self.block_size, self.top_k)
        return batch_size * (seq_len * token + work.SOFTMAX * scores)

    @property
    def expectation(self) -> str:
        blocks = f"{self.top_k} blocks of {self.block_size} keys"
        return (
            f"seer_attention: a group reads {blocks}, no two tokens of a call the same; the gate's loss is not counted"
        )

    def unread_bytes(self, batch_size: int, seq_len: int, context_len: int) -> int:
        token = 2 * self.num_kv_heads * self.head_dim * self.itemsize
        return batch_size * work.unread_keys(seq_len, context_len, self.top_k * self.block_size) * token

    def state_bytes(self, batch_size: int, max_len: int) -> int:
        heads, width = self.num_kv_heads, self.head_dim
        gate = -(-max_len // self.block_size) * heads * self.gate_dim + self.block_size * heads * width
        return (
            kv_cache_bytes(batch_size, max_len, heads, width, width, self.itemsize) + batch_size * gate * self.itemsize
        )

    def activation_elements(self, batch_size: int, seq_len: int) -> int:
        # x; q and k rotated, v, cos and sin for both, q as the gate reads it; o and its denominators; the lists
        q_width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        G, blocks, rotary = self.num_kv_heads, -(-seq_len // self.block_size), self.rope_base is not None
        token = self.dim + 2 * q_width + 2 * kv_width + self.num_heads + (2 * self.head_dim + q_width) * rotary
        if seq_len > self.top_k * self.block_size:
            token += G * min(self.top_k, blocks)
        # the gate's queries with their cos and sin; shares of blocks as they are and as they should be, a flag of each
        token += self.gate_dim * (G + rotary) + 2 * G * blocks + blocks // 4
        block = G * (3 * self.head_dim + self.gate_dim) + self.gate_dim * rotary  # pooled keys, the gate's keys
        return batch_size * (seq_len * token + blocks * block)

    def parallel_plan(self) -> ParallelPlan:
        tensor = {"q_proj": "column", "k_proj": "column", "v_proj": "column", "o_proj": "row"}
        tensor |= {"gate_q": "column", "gate_k": "column"}
        return ParallelPlan(tensor, units=self.num_kv_heads, context="gather_input")
