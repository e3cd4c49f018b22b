"""InfLLM-V2: attention that is dense up to a length and reads only its best blocks of keys beyond it, without new
parameters. Zhao et al. 2025, arXiv:2509.24663; MiniCPM4, arXiv:2506.07900.

    kc_c = mean of the (rotated) keys of window c               32 tokens each, starting every 16
    p_t  = sum over the heads of the group of softmax(q_t . kc / sqrt(D)) over the windows complete at t
    S(t) = the first blocks, the last ones, and those touched by the windows with the largest p_t
    o_t  = softmax(q_t . K[S] / sqrt(D), token-causal) V[S]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.blocks.compression import CompressedSelection, write_slots
from zoo.blocks.heads import grouped_heads
from zoo.blocks.kv_cache import KVCache, kv_cache_bytes, segment_index
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
from zoo.kernels import block_scores as scoring
from zoo.kernels import sparse_attention as attending
from zoo.kernels import work
from zoo.kernels.attention import attention, attention_flops
from zoo.kernels.block_list import BlockList
from zoo.kernels.dispatch import check_backend
from zoo.kernels.linear import Linear
from zoo.kernels.rope import rope
from zoo.kernels.sparse_attention import sparse_attention
from zoo.registry import register
from zoo.schema import NonNegativeInt, PositiveFloat, PositiveInt


@dataclass
class InfLLMV2State(State):
    """The key-value cache and the mean key of every window [B, slots, Hkv, D]."""

    cache: KVCache
    pooled: Tensor


@register(
    "infllm_v2",
    kind="mixer",
    paper="arXiv:2509.24663",
    ops=("attention", "sparse_attention", "block_scores", "select", "rope"),
    state_growth="linear",
    relations=(
        "infllm_v2() == attention()",
        "infllm_v2(dense_len=0) == attention()",
        "infllm_v2(dense_len=0, block_size=4096, window=4096) == attention()",
        "infllm_v2(dense_len=0, num_heads=4, num_kv_heads=2, kernel_size=4, kernel_stride=2, block_size=4, window=8,"
        " top_k=99) == attention(num_heads=4, num_kv_heads=2)",
        "infllm_v2(dense_len=0, block_size=16, window=32, top_k=2, init_blocks=0, local_extra=True) =="
        " infllm_v2(dense_len=0, block_size=16, window=32, top_k=4, init_blocks=0)",
    ),
    examples=(
        {"num_heads": 4, "num_kv_heads": 2, "kernel_size": 8, "kernel_stride": 4, "block_size": 16, "window": 16,
         "top_k": 3, "dense_len": 0},
        {"num_heads": 4, "num_kv_heads": 1, "kernel_size": 4, "kernel_stride": 2, "block_size": 4, "window": 8,
         "top_k": 5, "dense_len": 40},
        {"num_heads": 2, "kernel_size": 4, "kernel_stride": 4, "block_size": 8, "window": 8, "top_k": 2,
         "local_extra": True, "dense_len": 10, "rope": False},
    ),
)  # fmt: skip
class InfLLMV2(Block):
    """Dense attention for a token among the first dense_len; beyond, its group's best blocks of keys.

    One set of keys and values serves both, and no parameter is added, so that a dense model can be trained on.
    A group of query heads reads top_k blocks of block_size tokens: the init_blocks first ones, the
    window / block_size last ones with its own, and those with the largest score, which is the most that any window
    touching the block gets of sum_h softmax(q_h . kc). `local_extra`: the local blocks come on top of top_k, as in
    the released MiniCPM4 (64 + 32 blocks; its kernels count 64 in all). Selection has no gradient.
    x: [B, T, D] -> y: [B, T, D]. T^2 / kernel_stride work for scores, T top_k block_size for attention. State:
    KV cache and one key a stride; a decoded token reads the listed blocks and the compressed keys.
    T <= dense_len, or top_k >= all blocks, is attention. The released code compares dense_len with the whole
    sequence; here each token compares its own place in its document, so that prefill and decoding agree.
    Useful: 4 H d FLOPs for each key that is read, 2 H d for each window that is scored.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: PositiveInt | None = None,
        num_kv_heads: PositiveInt | None = None,
        head_dim: PositiveInt | None = None,
        kernel_size: PositiveInt = 32,
        kernel_stride: PositiveInt = 16,
        block_size: PositiveInt = 64,
        top_k: PositiveInt = 64,
        init_blocks: NonNegativeInt = 1,
        window: PositiveInt = 2048,
        local_extra: bool = False,
        dense_len: NonNegativeInt = 8192,
        rope: bool = True,
        rope_base: PositiveFloat = 10000.0,
        kernel: str = "auto",
        device=None,
        dtype=None,
    ):
        super().__init__(dim)
        self.num_heads, self.num_kv_heads, self.head_dim = grouped_heads(
            dim, num_heads, num_kv_heads, head_dim, rotated=rope
        )
        if window % block_size:
            raise ValueError(f"window={window} is read in whole blocks: make it a multiple of block_size={block_size}")
        check_backend("sparse_attention", kernel)
        local = window // block_size
        self.rule = CompressedSelection(
            kernel_size, kernel_stride, block_size, top_k + local * local_extra, init_blocks, local, pool="max"
        )
        self.block_size, self.dense_len, self.kernel = block_size, dense_len, kernel
        self.rope_base = rope_base if rope else None
        factory = {"device": device, "dtype": dtype}
        q_width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q_proj = Linear(dim, q_width, bias=False, **factory)
        self.k_proj = Linear(dim, kv_width, bias=False, **factory)
        self.v_proj = Linear(dim, kv_width, bias=False, **factory)
        self.o_proj = Linear(q_width, dim, bias=False, **factory)

    def reset_parameters(self) -> None:
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            init_linear_(linear)

    def forward(
        self,
        x: Tensor,
        *,
        state: InfLLMV2State | None = None,
        positions: Tensor | None = None,
        doc_ids: Tensor | None = None,
    ) -> Tensor:
        refuse_packed_streaming(state, doc_ids)
        B, T, _ = x.shape
        order = positions_from(doc_ids, B, T, x.device) if state is None else segment_index(state.cache.length, T)
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.rope_base is not None:
            q, k = (rope(h, order if positions is None else positions, base=self.rope_base) for h in (q, k))
        index = order if doc_ids is None else torch.arange(T, device=x.device).expand(B, T)
        num_keys, compressed = T, None
        q_index = k_index = None
        if state is not None:
            empty = state.cache.size == 0  # then the keys are those of the segment, in order
            k, v, k_index, q_index = state.cache.append(k, v)
            num_keys, compressed = state.cache.size, self._compress_cached(state, index)
            if empty:
                q_index = k_index = None
        if num_keys <= self.dense_len:
            o, _ = attention(q, k, v, q_index=q_index, k_index=k_index, q_doc_ids=doc_ids, k_doc_ids=doc_ids)
        else:
            pooled, end = compressed or self._compress(k, doc_ids)
            blocks = self._route(q, pooled, end, index, order, num_keys, doc_ids)
            o, _ = sparse_attention(
                q, k, v, blocks, q_index=q_index, k_index=k_index, q_doc_ids=doc_ids, k_doc_ids=doc_ids,
                backend=self.kernel,
            )  # fmt: skip
        return self.o_proj(o.flatten(2))

    @torch.no_grad()
    def _compress(self, k: Tensor, doc_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean keys [B, N, Hkv, D] of the windows and the last token of each [B, N], -1 for none."""
        start = self.rule.starts(k.shape[1], doc_ids, k)
        return self._mean(k, start), torch.where(start >= 0, start + self.rule.kernel_size - 1, -1)

    @torch.no_grad()
    def _compress_cached(self, state: InfLLMV2State, index: Tensor) -> tuple[Tensor, Tensor]:
        """The same of the cache, after adding the windows that the newest tokens, at `index` [B, T], complete."""
        rule, size = self.rule, state.cache.size
        missing = rule.num_slots(state.cache.k.shape[1]) - state.pooled.shape[1]
        if missing > 0:
            state.pooled = F.pad(state.pooled, (0, 0, 0, 0, 0, missing))
        slots = rule.new_slots(index[:, 0], index.shape[1])
        new = self._mean(state.cache.k[:, :size], slots * rule.kernel_stride)
        pooled = write_slots(state.pooled, new, slots, rule.num_slots(size))
        return pooled, rule.ends(state.cache.length, size)

    def _mean(self, k: Tensor, start: Tensor) -> Tensor:
        return self.rule.gather(k, start).mean(2, dtype=state_dtype(k.dtype)).to(k.dtype)

    @torch.no_grad()
    def _route(
        self,
        q: Tensor,
        pooled: Tensor,
        end: Tensor,
        index: Tensor,
        order: Tensor,
        num_keys: int,
        doc_ids: Tensor | None,
    ) -> BlockList:
        """Lists of the chosen blocks, and of every block for the tokens whose `order` is below dense_len."""
        best = self.rule.select(q, pooled, end, index, num_keys, doc_ids)
        block = torch.arange(self._num_dense, device=q.device)
        seen = block * best.kv_block <= order[..., None]
        first = (index - order)[..., None]  # of the document
        every = torch.where(seen, first + block * best.kv_block if doc_ids is not None else block, -1)
        every = every[:, None].int().expand(-1, pooled.shape[2], -1, -1)
        slots = max(every.shape[-1], best.idx.shape[-1])
        every, chosen = (F.pad(idx, (0, slots - idx.shape[-1]), value=-1) for idx in (every, best.idx))
        idx = torch.where((order < self.dense_len)[:, None, :, None], every, chosen)
        return BlockList(idx, kv_block=best.kv_block, stride=best.stride)

    @property
    def _num_dense(self) -> int:
        """Blocks that a token at place dense_len - 1 sees."""
        return -(-self.dense_len // self.block_size)

    def init_state(self, batch_size: int, max_len: int | None = None) -> InfLLMV2State:
        like = self.reference_parameter.detach()
        cache = KVCache.create(batch_size, max_len, self.num_kv_heads, self.head_dim, like=like)
        slots = self.rule.num_slots(cache.k.shape[1])
        return InfLLMV2State(cache, like.new_zeros(batch_size, slots, self.num_kv_heads, self.head_dim))

    def forward_flops(self, batch_size: int, seq_len: int, context_len: int = 0, streaming: bool = False) -> int:
        B, T, Hq, Hkv, size = batch_size, seq_len, self.num_heads, self.num_kv_heads, self.head_dim
        context = context_len if streaming else 0
        keys = T + context
        flops = linear_flops(B * T, self.q_proj, self.k_proj, self.v_proj, self.o_proj)
        if keys <= self.dense_len:
            return flops + attention_flops(B, T, keys, Hq, size, plain=not context)
        slots = max(self.rule.num_listed(keys), self._num_dense)
        flops += scoring.flops(B, T, self.rule.num_slots(keys), Hq, size)
        return flops + attending.flops(B, T, keys, Hq, Hkv, size, size, slots, self.block_size, Hkv)

    def useful_flops(self, batch_size: int, seq_len: int, context_len: int = 0) -> int:
        pairs, scored = self._pairs(seq_len, context_len)
        linears = linear_flops(batch_size * seq_len, self.q_proj, self.k_proj, self.v_proj, self.o_proj)
        return linears + batch_size * self.num_heads * self.head_dim * (4 * pairs + 2 * scored)

    def _pairs(self, seq_len: int, context_len: int) -> tuple[int, int]:
        """Keys that a row's queries read, and windows that they score: from place dense_len on."""
        early, rule = max(0, min(seq_len, self.dense_len - context_len)), self.rule
        late, start = seq_len - early, context_len + early
        pairs = work.pairs(early, context_len) + work.block_pairs(late, start, self.block_size, rule.top_k)
        return pairs, work.window_scores(late, start, rule.kernel_stride, rule.kernel_size)

    def vector_flops(self, batch_size: int, seq_len: int, context_len: int = 0) -> int:
        H, Hkv, D = self.num_heads, self.num_kv_heads, self.head_dim
        token = 0 if self.rope_base is None else work.ROPE * (H + Hkv) * D
        token += Hkv * D * self.rule.kernel_size // self.rule.kernel_stride  # sums of the means
        return batch_size * (seq_len * token + work.SOFTMAX * H * sum(self._pairs(seq_len, context_len)))

    @property
    def expectation(self) -> str:
        blocks = f"{self.rule.top_k} blocks of {self.block_size} keys"
        return f"infllm_v2: beyond dense_len a group reads {blocks}, no two tokens of a call the same"

    def unread_bytes(self, batch_size: int, seq_len: int, context_len: int) -> int:
        if context_len < self.dense_len:
            return 0
        token = 2 * self.num_kv_heads * self.head_dim * self.itemsize
        return batch_size * work.unread_keys(seq_len, context_len, self.rule.top_k * self.block_size) * token

    def state_bytes(self, batch_size: int, max_len: int) -> int:
        width, itemsize = self.num_kv_heads * self.head_dim, self.itemsize
        cache = kv_cache_bytes(batch_size, max_len, self.num_kv_heads, self.head_dim, self.head_dim, itemsize)
        return cache + batch_size * self.rule.num_slots(max_len) * width * itemsize

    def activation_elements(self, batch_size: int, seq_len: int) -> int:
        # x; q and k rotated, v, cos and sin for both; o and its denominators; the lists
        q_width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        token = self.dim + 2 * q_width + 2 * kv_width + self.num_heads
        token += 0 if self.rope_base is None else 2 * self.head_dim
        if seq_len > self.dense_len:
            token += self.num_kv_heads * max(self.rule.num_listed(seq_len), self._num_dense)
        return batch_size * seq_len * token

    def parallel_plan(self) -> ParallelPlan:
        tensor = {"q_proj": "column", "k_proj": "column", "v_proj": "column", "o_proj": "row"}
        return ParallelPlan(tensor, units=self.num_kv_heads, context="gather_input")
