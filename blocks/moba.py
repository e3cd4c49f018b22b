"""Mixture of Block Attention: each query head attends to its own block of keys and to the past blocks whose
mean key it likes best. Lu et al. 2025, arXiv:2502.13189; short convolution on the keys: arXiv:2511.11571.

    kbar_n  = mean of the keys of block n
    S(t, h) = {own block} + the top_k - 1 complete blocks before t with the largest q_{t,h} . kbar_n
    o_t     = softmax(q_t . K[S] / sqrt(D), token-causal) V[S]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.blocks.heads import grouped_heads
from zoo.blocks.kv_cache import KVCache, kv_cache_bytes, segment_index
from zoo.blocks.norms import RMSNorm
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
from zoo.kernels import select_blocks as selecting
from zoo.kernels import sparse_attention as attending
from zoo.kernels import work
from zoo.kernels.block_list import BlockList, sort_ids
from zoo.kernels.dispatch import check_backend
from zoo.kernels.linear import Linear
from zoo.kernels.pool_blocks import pool_blocks
from zoo.kernels.rope import rope
from zoo.kernels.select_blocks import select_blocks
from zoo.kernels.short_conv import short_conv
from zoo.kernels.slices import attention_keys
from zoo.kernels.sparse_attention import sparse_attention
from zoo.registry import register
from zoo.row import current
from zoo.schema import NonNegativeInt, PositiveFloat, PositiveInt
from zoo.segments import handed_on


@dataclass
class MobaState(State):
    """The key-value cache, the sum of the keys of every block [B, blocks, Hkv, D] in fp32, and the inputs
    [B, key_conv - 1, Hkv * D] that the key convolution still needs."""

    cache: KVCache
    sums: Tensor
    tail: Tensor


@register(
    "moba",
    kind="mixer",
    paper="arXiv:2502.13189",
    ops=("sparse_attention", "select_blocks", "pool_blocks", "rope", "short_conv"),
    state_growth="linear",
    relations=(
        "moba(block_size=4096) == attention()",
        "moba(block_size=8, top_k=4096) == attention()",
        "moba(num_heads=4, num_kv_heads=2, block_size=8, top_k=99) == attention(num_heads=4, num_kv_heads=2)",
        "moba(num_heads=4, block_size=8, top_k=2, key_conv=3) == moba(num_heads=4, block_size=8, top_k=2) at "
        "k_conv1d.weight=0",
    ),
    examples=(
        {"num_heads": 4, "num_kv_heads": 2, "block_size": 16, "top_k": 3},
        {"num_heads": 4, "block_size": 8, "top_k": 2, "key_conv": 3, "qk_norm": "head"},
        {"num_heads": 2, "block_size": 16, "top_k": 1, "rope": False},
    ),
)
class MoBA(Block):
    """Attention of each query head to its own block and to its top_k - 1 favourite past blocks.

    g[t,h,n] = q[t,h] . mean(K_n) over complete blocks n before t; o = softmax(q K^T / sqrt(D)) V over the own
    block (causal) and the blocks with the largest g, ties to the earliest. The own block is one of the top_k.
    Selection has no gradient. In packed documents blocks are counted from each document's start.
    `key_conv` W: k <- k + silu(conv_W(k)), depthwise and causal, before rotation (0: off).

    x: [B, T, D] -> y: [B, T, D]. T^2 / block_size work for scores, T * top_k * block_size for attention.
    State: KV cache and one summed key per block; decoding reads top_k blocks. top_k >= all blocks is dense
    attention; top_k = 1 is attention inside each block alone.
    Useful: 2 H d FLOPs for each past block and 4 H d for each key of the chosen ones up to the token.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: PositiveInt | None = None,
        num_kv_heads: PositiveInt | None = None,
        head_dim: PositiveInt | None = None,
        block_size: PositiveInt = 256,
        top_k: PositiveInt = 4,
        rope: bool = True,
        rope_base: PositiveFloat = 10000.0,
        qk_norm: Literal["none", "head"] = "none",
        key_conv: NonNegativeInt = 0,
        kernel: str = "auto",
        device=None,
        dtype=None,
    ):
        super().__init__(dim)
        self.num_heads, self.num_kv_heads, self.head_dim = grouped_heads(
            dim, num_heads, num_kv_heads, head_dim, rotated=rope
        )
        check_backend("sparse_attention", kernel)
        self.block_size, self.top_k, self.kernel = block_size, top_k, kernel
        self.rope_base = rope_base if rope else None
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        q_width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q_proj = Linear(dim, q_width, bias=False, **factory)
        self.k_proj = Linear(dim, kv_width, bias=False, **factory)
        self.v_proj = Linear(dim, kv_width, bias=False, **factory)
        self.o_proj = Linear(q_width, dim, bias=False, **factory)
        self.q_norm = RMSNorm(self.head_dim, **factory) if qk_norm == "head" else None
        self.k_norm = RMSNorm(self.head_dim, **factory) if qk_norm == "head" else None
        self.k_conv1d = (
            nn.Conv1d(kv_width, kv_width, key_conv, groups=kv_width, bias=False, **factory) if key_conv else None
        )

    def reset_parameters(self) -> None:
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            init_linear_(linear)
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                norm.reset_parameters()
        if self.k_conv1d is not None:
            nn.init.zeros_(self.k_conv1d.weight)  # starts as plain MoBA; silu'(0) = 1/2 lets it learn

    def forward(
        self,
        x: Tensor,
        *,
        state: MobaState | None = None,
        positions: Tensor | None = None,
        doc_ids: Tensor | None = None,
    ) -> Tensor:
        refuse_packed_streaming(state, doc_ids)
        B, T, _ = x.shape
        order = positions_from(doc_ids, B, T, x.device) if state is None else segment_index(state.cache.length, T)
        q, k, v = self._project(x, order if positions is None else positions, state, doc_ids)
        if state is None:
            index = k_index = torch.arange(T, device=x.device).expand(B, T)
            k_doc_ids = doc_ids
            if (part := current()) is not None:
                k, v, index, k_index, k_doc_ids = attention_keys(part, q, k, v, True, None, None, doc_ids)
            pooled, start = pool_blocks(k.detach(), self.block_size, doc_ids=k_doc_ids)
            end = torch.where(start >= 0, start + self.block_size - 1, -1)
            masks: dict[str, Any] = {} if part is None else {"q_index": index, "k_index": k_index}
            if doc_ids is None:
                blocks = self._route(q, pooled, end, index, own=index // self.block_size)
            else:
                docs = {"q_doc_ids": doc_ids, "k_doc_ids": k_doc_ids}
                own = index - order % self.block_size
                blocks = self._route(q, pooled, end, index, own, **docs, start=start)
                masks |= docs
        else:
            new = k
            k, v, k_index, q_index = state.cache.append(k, v)
            masks = {"q_index": q_index, "k_index": k_index}
            pooled, end = self._pool_cached(state, new, q_index)
            blocks = self._route(q, pooled, end, q_index, own=q_index // self.block_size)
        o, _ = sparse_attention(q, k, v, blocks, **masks, backend=self.kernel)
        return self.o_proj(o.flatten(2))

    def _project(
        self, x: Tensor, positions: Tensor, state: MobaState | None, doc_ids: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        k = self.k_proj(x)
        if self.k_conv1d is not None:
            tail = None if state is None else state.tail
            weight = self.k_conv1d.weight[:, 0]
            near, new_tail = short_conv(k, weight, activation="silu", state=tail, doc_ids=doc_ids)
            k = k + near
            if state is not None:
                state.tail.copy_(handed_on(new_tail))
        q, k, v = (h.unflatten(-1, (-1, self.head_dim)) for h in (self.q_proj(x), k, self.v_proj(x)))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rope_base is not None:
            q, k = (rope(h, positions, base=self.rope_base) for h in (q, k))
        return q, k, v

    @torch.no_grad()
    def _pool_cached(self, state: MobaState, new: Tensor, q_index: Tensor) -> tuple[Tensor, Tensor]:
        """Add the new keys to their blocks' sums; mean key and order index of the last token of each block."""
        missing = -(-state.cache.k.shape[1] // self.block_size) - state.sums.shape[1]
        if missing > 0:
            state.sums = F.pad(state.sums, (0, 0, 0, 0, 0, missing))
        row = torch.arange(new.shape[0], device=new.device)[:, None]
        state.sums.index_put_((row, q_index // self.block_size), new.to(state.sums.dtype), accumulate=True)
        blocks = -(-state.cache.size // self.block_size)
        end = (torch.arange(blocks, device=new.device) + 1) * self.block_size - 1
        return state.sums[:, :blocks] / self.block_size, torch.where(end < state.cache.length[:, None], end, -1)

    @torch.no_grad()
    def _route(
        self,
        q: Tensor,
        pooled: Tensor,
        end: Tensor,
        index: Tensor,
        own: Tensor,
        q_doc_ids: Tensor | None = None,
        k_doc_ids: Tensor | None = None,
        start: Tensor | None = None,
    ) -> BlockList:
        """Own block [B, T] and the best past ones; with documents, blocks are named by their first token."""
        idx = own[:, None, :, None].expand(-1, q.shape[2], -1, 1)
        if self.top_k > 1:
            docs = {}
            if k_doc_ids is not None and start is not None:
                docs = {"q_doc_ids": q_doc_ids, "k_doc_ids": k_doc_ids.gather(1, start.clamp(min=0))}
            past = select_blocks(q, pooled.to(q.dtype), self.top_k - 1, q_index=index, k_index=end, **docs).idx
            if start is not None:
                table = start[:, None, None].expand(-1, *past.shape[1:3], -1)
                past = torch.where(past >= 0, table.gather(-1, past.clamp(min=0).long()), -1)
            idx = torch.cat([past, idx], -1)
        return BlockList(sort_ids(idx), kv_block=self.block_size, stride=self.block_size if start is None else 1)

    def init_state(self, batch_size: int, max_len: int | None = None) -> MobaState:
        like = self.reference_parameter
        cache = KVCache.create(batch_size, max_len, self.num_kv_heads, self.head_dim, like=like)
        blocks = -(-cache.k.shape[1] // self.block_size)
        shape = (batch_size, blocks, self.num_kv_heads, self.head_dim)
        return MobaState(
            cache,
            torch.zeros(shape, dtype=state_dtype(like.dtype), device=like.device),
            like.new_zeros(batch_size, self._tail_len, self.num_kv_heads * self.head_dim),
        )

    @property
    def _tail_len(self) -> int:
        return 0 if self.k_conv1d is None else self.k_conv1d.kernel_size[0] - 1

    def forward_flops(self, batch_size: int, seq_len: int, context_len: int = 0, streaming: bool = False) -> int:
        keys = seq_len + (context_len if streaming else 0)
        blocks = -(-keys // self.block_size)
        heads, size = (self.num_heads, self.num_kv_heads), self.head_dim
        flops = linear_flops(batch_size * seq_len, self.q_proj, self.k_proj, self.v_proj, self.o_proj)
        if self.top_k > 1:
            flops += selecting.flops(batch_size, seq_len, blocks, self.num_heads, size)
        lists = (min(self.top_k - 1, blocks) + 1, self.block_size, self.num_heads)
        return flops + attending.flops(batch_size, seq_len, keys, *heads, size, size, *lists)

    def useful_flops(self, batch_size: int, seq_len: int, context_len: int = 0) -> int:
        scores = self.num_heads * work.block_pairs(seq_len, context_len, self.block_size, self.top_k)
        routed = self.num_heads * work.earlier_blocks(seq_len, context_len, self.block_size) * (self.top_k > 1)
        linears = linear_flops(batch_size * seq_len, self.q_proj, self.k_proj, self.v_proj, self.o_proj)
        return linears + batch_size * self.head_dim * (4 * scores + 2 * routed)

    def vector_flops(self, batch_size: int, seq_len: int, context_len: int = 0) -> int:
        H, Hkv, D = self.num_heads, self.num_kv_heads, self.head_dim
        token = Hkv * D  # sums of the keys of a block
        token += 0 if self.rope_base is None else work.ROPE * (H + Hkv) * D
        token += 0 if self.q_norm is None else work.RMS * (H + Hkv) * D
        if self.k_conv1d is not None:
            token += (2 * self.k_conv1d.kernel_size[0] + work.SILU + 1) * Hkv * D
        scores = H * work.block_pairs(seq_len, context_len, self.block_size, self.top_k)
        return batch_size * (seq_len * token + work.SOFTMAX * scores)

    @property
    def expectation(self) -> str:
        return f"moba: a query head reads {self.top_k} blocks of {self.block_size} keys, no two of a call the same"

    def unread_bytes(self, batch_size: int, seq_len: int, context_len: int) -> int:
        chosen = self.num_heads // self.num_kv_heads * self.top_k * self.block_size  # heads of a group differ
        token = 2 * self.num_kv_heads * self.head_dim * self.itemsize
        return batch_size * work.unread_keys(seq_len, context_len, chosen) * token

    def state_bytes(self, batch_size: int, max_len: int) -> int:
        width, itemsize = self.num_kv_heads * self.head_dim, self.itemsize
        sums = -(-max_len // self.block_size) * width * max(itemsize, 4)
        cache = kv_cache_bytes(batch_size, max_len, self.num_kv_heads, self.head_dim, self.head_dim, itemsize)
        return cache + batch_size * (sums + self._tail_len * width * itemsize)

    def activation_elements(self, batch_size: int, seq_len: int) -> int:
        # x; q and k rotated, v, cos and sin for both; with a norm q and k before it, with a convolution k before that;
        # o and its denominators, the lists
        q_width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        listed, tokens = min(self.top_k, -(-seq_len // self.block_size)), batch_size * seq_len
        token = self.dim + 2 * q_width + 2 * kv_width + self.num_heads * (1 + listed)
        token += (0 if self.rope_base is None else 2 * self.head_dim) + (0 if self.k_conv1d is None else kv_width)
        kept = tokens * token
        for norm, heads in ((self.q_norm, self.num_heads), (self.k_norm, self.num_kv_heads)):
            kept += 0 if norm is None else norm.activation_elements(tokens * heads)
        return kept

    def parallel_plan(self) -> ParallelPlan:
        tensor = {"q_proj": "column", "k_proj": "column", "v_proj": "column", "o_proj": "row"}
        if self.q_norm is not None:
            tensor |= {"q_norm": "replicate", "k_norm": "replicate"}
        if self.k_conv1d is not None:
            tensor |= {"k_conv1d": "column"}
        return ParallelPlan(tensor, units=self.num_kv_heads, context="gather_kv")
