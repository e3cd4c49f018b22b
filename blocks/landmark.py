"""Landmark attention: the last token of each section speaks for it, and lets its other tokens be attended to.
Mohtashami and Jaggi 2023, arXiv:2305.16300.

    l_c  = q_t . k of the last token of section c < own, its landmark; own = the section of t
    Z    = sum_{j in own, j <= t} e^{q_t k_j} + sum_c e^{l_c}
    o_t  = (sum_{j in own} e^{q_t k_j} v_j + sum_c e^{l_c} o_c) / Z,   o_c = softmax attention to c's other tokens
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from zoo.blocks.heads import grouped_heads
from zoo.blocks.kv_cache import KVCache, kv_cache_bytes, segment_index
from zoo.contract import (
    Block,
    ParallelPlan,
    init_linear_,
    linear_flops,
    positions_from,
    refuse_packed_streaming,
    state_dtype,
)
from zoo.kernels import pieces, work
from zoo.kernels import sparse_attention as attending
from zoo.kernels.block_list import BlockList
from zoo.kernels.dispatch import check_backend
from zoo.kernels.linear import Linear
from zoo.kernels.pool_blocks.chunked import block_starts
from zoo.kernels.precision import no_autocast
from zoo.kernels.rope import rope
from zoo.kernels.select import select
from zoo.kernels.sparse_attention import sparse_attention
from zoo.registry import register
from zoo.schema import PositiveFloat, PositiveInt

ELEMENTS_AT_ONCE = 1 << 24  # of the outputs of all sections for some queries


@register(
    "landmark",
    kind="mixer",
    paper="arXiv:2305.16300",
    ops=("sparse_attention", "select", "rope"),
    state_growth="linear",
    relations=(
        "landmark(block_size=4096) == attention()",
        "landmark(num_heads=4, num_kv_heads=2, block_size=4096) == attention(num_heads=4, num_kv_heads=2)",
        "landmark(block_size=8, top_k=99) == landmark(block_size=8)",
    ),
    examples=(
        {"num_heads": 4, "num_kv_heads": 2, "block_size": 16},
        {"num_heads": 4, "block_size": 8, "top_k": 2},
        {"num_heads": 2, "block_size": 2, "top_k": 5, "rope": False},
    ),
)
class LandmarkAttention(Block):
    """Attention to the own section of block_size tokens and, as far as their landmarks attract, to earlier sections.

    Every block_size-th token of a document is a landmark, the last of its section: data should hold a token of its
    own there (the paper inserts one after every 50 or 63). Weights are a softmax over the own section's other tokens
    up to t and the earlier landmarks; a landmark hands its weight on to a softmax over the other tokens of its
    section, and its own value has no weight. All weights sum to 1.
    `top_k`: each query head reads only the sections of its top_k best landmarks (None: all, as in training).
    x: [B, T, D] -> y: [B, T, D]. T^2 work, or T^2 / block_size for landmarks and T top_k block_size for sections.
    State: KV cache; decoding reads the landmarks, the chosen sections and the own one. Keys keep their true positions,
    where the paper moves the chosen sections next to the query. One section is attention.
    Useful: 4 H d FLOPs for each key of the own and the chosen sections, 2 H d for each landmark.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: PositiveInt | None = None,
        num_kv_heads: PositiveInt | None = None,
        head_dim: PositiveInt | None = None,
        block_size: PositiveInt = 64,
        top_k: PositiveInt | None = None,
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
        if block_size < 2:
            raise ValueError("block_size=1 leaves a section nothing but its landmark: make it at least 2")
        check_backend("sparse_attention", kernel)
        self.block_size, self.top_k, self.kernel = block_size, top_k, kernel
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

    def init_state(self, batch_size: int, max_len: int | None = None) -> KVCache:
        like = self.reference_parameter.detach()
        return KVCache.create(batch_size, max_len, self.num_kv_heads, self.head_dim, like=like)

    def forward(
        self,
        x: Tensor,
        *,
        state: KVCache | None = None,
        positions: Tensor | None = None,
        doc_ids: Tensor | None = None,
    ) -> Tensor:
        refuse_packed_streaming(state, doc_ids)
        B, T, _ = x.shape
        place = positions_from(doc_ids, B, T, x.device) if state is None else segment_index(state.length, T)
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.rope_base is not None:
            q, k = (rope(h, place if positions is None else positions, base=self.rope_base) for h in (q, k))
        index = place if doc_ids is None else torch.arange(T, device=x.device).expand(B, T)
        k_index = index
        if state is not None:
            k, v, k_index, _ = state.append(k, v)
        size, stride = self.block_size, self.block_size if doc_ids is None else 1
        own = index - place % size  # first token of the own section
        if doc_ids is None:
            first = (torch.arange(-(-k.shape[1] // size), device=x.device) * size).expand(B, -1)
        else:
            first = block_starts(T, size, doc_ids, x)
        earlier = (first >= 0)[:, None] & (first[:, None] < own[..., None])
        if doc_ids is not None:
            earlier = earlier & (doc_ids.gather(1, first.clamp(min=0))[:, None] == doc_ids[..., None])
        blocks = BlockList((own // stride)[:, None, :, None].int(), kv_block=size - 1, stride=stride)
        near = sparse_attention(q, k, v, blocks, q_index=index, k_index=k_index, backend=self.kernel)
        parts = self._parts(B, T, first.shape[1])
        outputs = []
        for part in parts:
            given = (q[:, part], k, v, near[0][:, part], near[1][:, part], first, earlier[:, part], stride)
            recompute = len(parts) > 1 and torch.is_grad_enabled()
            outputs.append(checkpoint(self._join, *given, use_reentrant=False) if recompute else self._join(*given))
        return self.o_proj(torch.cat(outputs, 1).flatten(2))

    def _join(
        self, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, first: Tensor, earlier: Tensor, stride: int
    ) -> Tensor:
        """Add the earlier sections to attention to the own one, o [B, T, H, D] with denominators lse [B, T, H].

        first: [B, N], first token of each section; earlier: [B, T, N], which sections precede the query's own."""
        B, T, H, D = q.shape
        wide = state_dtype(q.dtype)
        row = torch.arange(B, device=q.device)[:, None]
        landmarks = k[row, (first + self.block_size - 1).clamp(0, k.shape[1] - 1)]  # [B, N, Hkv, D]
        with no_autocast(q.device):
            rows = q.to(wide).unflatten(2, (landmarks.shape[2], -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)
            scores = (rows @ landmarks.to(wide).permute(0, 2, 3, 1)).reshape(B, H, T, -1) * D**-0.5
        N = scores.shape[-1]
        chosen = select(scores, self.top_k or N, visible=earlier[:, None]).idx.long()  # [B, H, T, n]
        weight = scores.gather(-1, chosen.clamp(min=0)).masked_fill(chosen < 0, float("-inf"))
        weight = torch.cat([lse.transpose(1, 2)[..., None], weight], -1).softmax(-1)
        # a query is asked once for each of its sections
        start = first[:, None, None].expand(-1, H, T, -1).gather(-1, chosen.clamp(min=0))
        idx = torch.where(chosen >= 0, start // stride, -1).flatten(2)[..., None].int()
        n = chosen.shape[-1]
        far, _ = sparse_attention(
            q[:, :, None].expand(-1, -1, n, -1, -1).flatten(1, 2), k, v,
            BlockList(idx, kv_block=self.block_size - 1, stride=stride), causal=False, backend=self.kernel,
        )  # fmt: skip
        far = far.unflatten(1, (T, n)).permute(0, 3, 1, 2, 4)  # [B, H, T, n, D]
        with no_autocast(q.device):
            far = (weight[..., None, 1:] @ far.to(wide)).squeeze(-2).transpose(1, 2)
        return (weight[..., :1].transpose(1, 2) * o + far).to(q.dtype)

    def _parts(self, batch_size: int, seq_len: int, sections: int) -> list[slice]:
        """Slices of the queries."""
        elements = batch_size * min(self.top_k or sections, sections) * self.num_heads * self.head_dim
        return pieces.cut(seq_len, elements, ELEMENTS_AT_ONCE)

    def forward_flops(self, batch_size: int, seq_len: int, context_len: int = 0, streaming: bool = False) -> int:
        B, T, Hq, Hkv, D, size = batch_size, seq_len, self.num_heads, self.num_kv_heads, self.head_dim, self.block_size
        keys = context_len + seq_len
        sections = -(-keys // size)
        n = min(self.top_k or sections, sections)
        flops = linear_flops(B * T, self.q_proj, self.k_proj, self.v_proj, self.o_proj)
        flops += attending.flops(B, T, keys, Hq, Hkv, D, D, 1, size - 1, 1, stride=size)
        flops += 2 * B * T * Hq * D * (sections + n)
        for part in self._parts(B, T, sections):
            queries = (part.stop - part.start) * n
            flops += attending.flops(B, queries, keys, Hq, Hkv, D, D, 1, size - 1, Hq, stride=size)
        return flops

    def useful_flops(self, batch_size: int, seq_len: int, context_len: int = 0) -> int:
        B, T, H, D, size = batch_size, seq_len, self.num_heads, self.head_dim, self.block_size
        flops = linear_flops(B * T, self.q_proj, self.k_proj, self.v_proj, self.o_proj)
        scored = work.earlier_blocks(T, context_len, size)
        chosen = work.earlier_blocks(T, context_len, size, self.top_k)
        # the own section, landmarks, the other tokens of chosen sections, sections joined
        pairs = 2 * work.block_pairs(T, context_len, size, 1) + scored + (2 * (size - 1) + 1) * chosen
        return flops + 2 * B * H * D * pairs

    def vector_flops(self, batch_size: int, seq_len: int, context_len: int = 0) -> int:
        H, Hkv, D, size = self.num_heads, self.num_kv_heads, self.head_dim, self.block_size
        token = 0 if self.rope_base is None else work.ROPE * (H + Hkv) * D
        chosen = work.earlier_blocks(seq_len, context_len, size, self.top_k)
        scores = H * (work.block_pairs(seq_len, context_len, size, 1) + size * chosen)
        return batch_size * (seq_len * token + work.SOFTMAX * scores)

    @property
    def expectation(self) -> str:
        if self.top_k is None:
            return ""
        return (
            f"landmark: a query head reads {self.top_k} sections of {self.block_size} keys, no two of a call the same"
        )

    def unread_bytes(self, batch_size: int, seq_len: int, context_len: int) -> int:
        if self.top_k is None:
            return 0
        chosen = self.num_heads // self.num_kv_heads * self.top_k * self.block_size  # heads of a group differ
        chosen += self.block_size + context_len // self.block_size  # the own section, landmarks
        token = 2 * self.num_kv_heads * self.head_dim * self.itemsize
        return batch_size * work.unread_keys(seq_len, context_len, chosen) * token

    def state_bytes(self, batch_size: int, max_len: int) -> int:
        return kv_cache_bytes(batch_size, max_len, self.num_kv_heads, self.head_dim, self.head_dim, self.itemsize)

    def activation_elements(self, batch_size: int, seq_len: int) -> int:
        # x; q and k rotated, with cos and sin, v; the own section's output with denominators, o
        q_width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        H, sections = self.num_heads, -(-seq_len // self.block_size)
        n = min(self.top_k or sections, sections)
        token = self.dim + 3 * q_width + 2 * kv_width + H + (0 if self.rope_base is None else 2 * self.head_dim) + 2
        if len(self._parts(batch_size, seq_len, sections)) == 1:  # else computed again
            # q as products read it, scores of all sections; of those chosen queries, outputs twice, denominators,
            # numbers as int64 and int32, a flag and the weight
            token += q_width + H * (sections + 1) + n * (3 * q_width + 5 * H + H // 4)
            token += kv_width * sections // seq_len
        return batch_size * seq_len * token

    def parallel_plan(self) -> ParallelPlan:
        tensor = {"q_proj": "column", "k_proj": "column", "v_proj": "column", "o_proj": "row"}
        return ParallelPlan(tensor, units=self.num_kv_heads, context="gather_input")
