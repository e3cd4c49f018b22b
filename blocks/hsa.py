"""Hierarchical sparse attention: retrieve a few chunks of the past, attend inside each alone, weigh what they say.
Hu et al. 2025, arXiv:2504.16795 (RAMba, with Mamba-2 between).

    l_c  = W_l mean of chunk c,  s_tc = (W_r x_t) . l_c / sqrt(dr)      over the chunks that end before t
    w_tk = sigmoid(s_tk) prod_{j more recent} (1 - sigmoid(s_tj))        over the top_k best, the newest first
    o_t  = sum_k w_tk softmax(q_t . K_k / sqrt(D)) V_k                   a softmax for each chunk
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from zoo.blocks.chunks import finished_chunks
from zoo.blocks.compression import write_slots
from zoo.blocks.heads import grouped_heads
from zoo.blocks.kv_cache import KVCache, kv_cache_bytes, segment_index
from zoo.blocks.norms import RMSNorm
from zoo.contract import (
    Block,
    ParallelPlan,
    State,
    init_linear_,
    linear_flops,
    refuse_packed_streaming,
    state_dtype,
)
from zoo.kernels import pieces, work
from zoo.kernels import sparse_attention as attending
from zoo.kernels.block_list import BlockList
from zoo.kernels.dispatch import check_backend
from zoo.kernels.linear import Linear
from zoo.kernels.pool_blocks import pool_blocks
from zoo.kernels.precision import no_autocast
from zoo.kernels.select import select
from zoo.kernels.sparse_attention import sparse_attention
from zoo.registry import register
from zoo.schema import PositiveInt
from zoo.segments import handed_on

ELEMENTS_AT_ONCE = 1 << 24  # of the outputs of all chunks for some queries


@dataclass
class HSAState(State):
    """The key-value cache, the landmark of every chunk [B, slots, Hr, dr], and the sum [B, D] of the inputs of the
    chunk that is being filled."""

    cache: KVCache
    landmarks: Tensor
    rest: Tensor


@register(
    "hsa",
    kind="mixer",
    paper="arXiv:2504.16795",
    ops=("sparse_attention", "select", "pool_blocks"),
    state_growth="linear",
    relations=("hsa(chunk_size=8, top_k=4096) == hsa(chunk_size=8, top_k=9)",),
    examples=(
        {"num_heads": 4, "num_kv_heads": 2, "chunk_size": 16, "top_k": 2, "retrieval_dim": 24},
        {"num_heads": 4, "num_kv_heads": 2, "num_retrieval_heads": 1, "chunk_size": 8, "top_k": 3, "k_norm": True},
        {"num_heads": 2, "chunk_size": 16, "top_k": 99, "weights": "softmax"},
    ),
)
class HierarchicalSparseAttention(Block):
    """Attention inside each of the top_k chunks that a learned retrieval likes best, mixed by retrieval's weights.

    s_tc = (W_r x_t) . l_c / sqrt(dr) ranks the complete chunks c before t for each retrieval head, ties to the
    earliest; the landmark l_c is W_l of the mean of the chunk's inputs. Each chunk has its own softmax. There are no
    positions: recency enters by stick breaking, w_k = sigmoid(s_k) prod_{j newer} (1 - sigmoid(s_j)), sum w < 1.
    `weights` "softmax": w = softmax(s) over the chosen. Retrieval learns through w. `k_norm`: RMS norm of each key.
    Each retrieval head serves num_kv_heads / num_retrieval_heads groups of query heads.
    x: [B, T, D] -> y: [B, T, D], zero before the first chunk has ended, so something local must stand beside it.
    T^2 / chunk_size work for retrieval, T top_k chunk_size for attention. State: KV cache, a landmark a chunk.
    Never dense. RAMba encodes chunks once, at mid depth, for all layers above; here each block reads its own input,
    and the optional bidirectional encoder of the chunks is left out.
    Useful: (4 chunk_size + 2) H d FLOPs for each chosen chunk, 2 dr a retrieval head for each past one.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: PositiveInt | None = None,
        num_kv_heads: PositiveInt | None = None,
        head_dim: PositiveInt | None = None,
        num_retrieval_heads: PositiveInt | None = None,
        retrieval_dim: PositiveInt = 256,
        chunk_size: PositiveInt = 64,
        top_k: PositiveInt = 8,
        weights: Literal["stick_breaking", "softmax"] = "stick_breaking",
        k_norm: bool = False,
        kernel: str = "auto",
        device=None,
        dtype=None,
    ):
        super().__init__(dim)
        self.num_heads, self.num_kv_heads, self.head_dim = grouped_heads(dim, num_heads, num_kv_heads, head_dim)
        self.num_retrieval_heads = num_retrieval_heads or self.num_kv_heads
        if self.num_kv_heads % self.num_retrieval_heads:
            raise ValueError(
                f"num_retrieval_heads={self.num_retrieval_heads} must divide num_kv_heads={self.num_kv_heads}"
            )
        check_backend("sparse_attention", kernel)
        self.chunk_size, self.top_k, self.weights, self.kernel = chunk_size, top_k, weights, kernel
        self.retrieval_dim = retrieval_dim
        factory = {"device": device, "dtype": dtype}
        q_width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        r_width = self.num_retrieval_heads * retrieval_dim
        self.q_proj = Linear(dim, q_width, bias=False, **factory)
        self.k_proj = Linear(dim, kv_width, bias=False, **factory)
        self.v_proj = Linear(dim, kv_width, bias=False, **factory)
        self.retrieval_proj = Linear(dim, r_width, bias=False, **factory)
        self.landmark_proj = Linear(dim, r_width, bias=False, **factory)
        self.o_proj = Linear(q_width, dim, bias=False, **factory)
        self.k_norm = RMSNorm(self.head_dim, **factory) if k_norm else None

    def reset_parameters(self) -> None:
        for linear in (
            self.q_proj, self.k_proj, self.v_proj, self.retrieval_proj, self.landmark_proj, self.o_proj,
        ):  # fmt: skip
            init_linear_(linear)
        if self.k_norm is not None:
            self.k_norm.reset_parameters()

    def init_state(self, batch_size: int, max_len: int | None = None) -> HSAState:
        like = self.reference_parameter.detach()
        cache = KVCache.create(batch_size, max_len, self.num_kv_heads, self.head_dim, like=like)
        slots = -(-cache.k.shape[1] // self.chunk_size)
        landmarks = like.new_zeros(batch_size, slots, self.num_retrieval_heads, self.retrieval_dim)
        return HSAState(cache, landmarks, like.new_zeros(batch_size, self.dim, dtype=state_dtype(like.dtype)))

    def forward(
        self,
        x: Tensor,
        *,
        state: HSAState | None = None,
        positions: Tensor | None = None,
        doc_ids: Tensor | None = None,
    ) -> Tensor:
        refuse_packed_streaming(state, doc_ids)
        B, T, _ = x.shape
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        r = self.retrieval_proj(x).unflatten(-1, (-1, self.retrieval_dim))
        if self.k_norm is not None:
            k = self.k_norm(k)
        if state is None:
            index = torch.arange(T, device=x.device).expand(B, T)
            mean, first = pool_blocks(x[:, :, None], self.chunk_size, doc_ids=doc_ids)
            landmarks = self._landmarks(mean[:, :, 0].to(x.dtype))
        else:
            index = segment_index(state.cache.length, T)
            k, v, _, _ = state.cache.append(k, v)
            landmarks = self._append_landmarks(x, index, state)
            first = (torch.arange(landmarks.shape[1], device=x.device) * self.chunk_size).expand(B, -1)
        past = (first >= 0)[:, None] & (first[:, None] + self.chunk_size <= index[..., None])
        if doc_ids is not None:
            past = past & (doc_ids.gather(1, first.clamp(min=0))[:, None] == doc_ids[..., None])
        parts = self._parts(B, T, first.shape[1])
        outputs = []
        for part in parts:
            given = (q[:, part], r[:, part], k, v, landmarks, first, past[:, part], 1 if doc_ids is not None else 0)
            recompute = len(parts) > 1 and torch.is_grad_enabled()
            outputs.append(checkpoint(self._attend, *given, use_reentrant=False) if recompute else self._attend(*given))
        return self.o_proj(torch.cat(outputs, 1).flatten(2))

    def _landmarks(self, mean: Tensor) -> Tensor:
        return self.landmark_proj(mean).unflatten(-1, (-1, self.retrieval_dim))

    def _append_landmarks(self, x: Tensor, index: Tensor, state: HSAState) -> Tensor:
        """Landmarks [B, N, Hr, dr] of all chunks of the cache, those included that the tokens x complete. Slots of
        chunks that stay incomplete are written again later."""
        missing = -(-state.cache.k.shape[1] // self.chunk_size) - state.landmarks.shape[1]
        if missing > 0:
            state.landmarks = F.pad(state.landmarks, (0, 0, 0, 0, 0, missing))
        ended = finished_chunks(x, index, self.chunk_size, carry=state.rest)
        state.rest.copy_(handed_on(ended.rest))
        slots = index[:, :1] // self.chunk_size + torch.arange(ended.means.shape[1], device=x.device)
        new = self._landmarks(ended.means.to(x.dtype))
        return write_slots(state.landmarks, new, slots, -(-state.cache.size // self.chunk_size))

    def _attend(
        self, q: Tensor, r: Tensor, k: Tensor, v: Tensor, landmarks: Tensor, first: Tensor, past: Tensor, stride: int
    ) -> Tensor:
        """Outputs [B, T, Hq, D] of queries q and r over the chunks that start at `first` [B, N], of which each query
        may choose those in `past` [B, T, N]. stride 1: chunks start anywhere (packed documents)."""
        (T, Hq), groups, size = q.shape[1:3], k.shape[2], self.chunk_size
        wide = state_dtype(q.dtype)
        with no_autocast(q.device):
            scores = r.to(wide).transpose(1, 2) @ landmarks.to(wide).permute(0, 2, 3, 1) * self.retrieval_dim**-0.5
        chosen = select(scores, self.top_k, visible=past[:, None]).idx.long()  # [B, Hr, T, n], ascending
        weight = self._weights(scores.gather(-1, chosen.clamp(min=0)), chosen >= 0)
        start = first[:, None, None].expand(*chosen.shape[:3], -1).gather(-1, chosen.clamp(min=0))
        idx = torch.where(chosen >= 0, start // (stride or size), -1).int()
        n = idx.shape[-1]
        idx = idx.repeat_interleave(groups // idx.shape[1], 1).flatten(2)[..., None]
        # a query is asked once for each of its chunks
        o, _ = sparse_attention(
            q[:, :, None].expand(-1, -1, n, -1, -1).flatten(1, 2), k, v,
            BlockList(idx, kv_block=size, stride=stride), causal=False, backend=self.kernel,
        )  # fmt: skip
        o = o.unflatten(1, (T, n)).permute(0, 3, 1, 2, 4)  # [B, Hq, T, n, D]
        weight = weight.repeat_interleave(Hq // weight.shape[1], 1)[..., None, :]
        with no_autocast(q.device):
            return (weight @ o.to(wide)).squeeze(-2).transpose(1, 2).to(q.dtype)

    def _weights(self, scores: Tensor, chosen: Tensor) -> Tensor:
        """Weights of chunks in the order of time, 0 where not `chosen`."""
        if self.weights == "softmax":
            some = chosen.any(-1, keepdim=True)
            return scores.masked_fill(~chosen & some, float("-inf")).softmax(-1) * some
        rest = F.softplus(scores) * chosen  # -log(1 - sigmoid)
        newer = rest.flip(-1).cumsum(-1).flip(-1)  # of the chunk itself and those after it
        return torch.exp((scores - newer).masked_fill(~chosen, float("-inf")))

    def _parts(self, batch_size: int, seq_len: int, chunks: int) -> list[slice]:
        """Slices of the queries."""
        elements = batch_size * min(self.top_k, chunks) * self.num_heads * self.head_dim
        return pieces.cut(seq_len, elements, ELEMENTS_AT_ONCE)

    def forward_flops(self, batch_size: int, seq_len: int, context_len: int = 0, streaming: bool = False) -> int:
        B, T, Hq, Hkv, D, size = batch_size, seq_len, self.num_heads, self.num_kv_heads, self.head_dim, self.chunk_size
        keys = context_len + T
        chunks = -(-keys // size)
        n = min(self.top_k, chunks)
        flops = linear_flops(B * T, self.q_proj, self.k_proj, self.v_proj, self.retrieval_proj, self.o_proj)
        flops += linear_flops(B * -(-T // size), self.landmark_proj)
        flops += 2 * B * T * (self.num_retrieval_heads * self.retrieval_dim * chunks + Hq * D * n)
        for part in self._parts(B, T, chunks):
            flops += attending.flops(B, (part.stop - part.start) * n, keys, Hq, Hkv, D, D, 1, size, Hkv)
        return flops

    def useful_flops(self, batch_size: int, seq_len: int, context_len: int = 0) -> int:
        B, T, H, D, size = batch_size, seq_len, self.num_heads, self.head_dim, self.chunk_size
        flops = linear_flops(B * T, self.q_proj, self.k_proj, self.v_proj, self.retrieval_proj, self.o_proj)
        flops += linear_flops(B * ((context_len + T) // size - context_len // size), self.landmark_proj)
        ranked = work.earlier_blocks(T, context_len, size)
        chosen = work.earlier_blocks(T, context_len, size, self.top_k)
        retrieval = self.num_retrieval_heads * self.retrieval_dim * ranked
        return flops + 2 * B * (retrieval + H * D * (2 * size + 1) * chosen)

    def vector_flops(self, batch_size: int, seq_len: int, context_len: int = 0) -> int:
        H, Hkv, D = self.num_heads, self.num_kv_heads, self.head_dim
        token = self.dim + (0 if self.k_norm is None else work.RMS * Hkv * D)  # the mean of a chunk
        chosen = work.earlier_blocks(seq_len, context_len, self.chunk_size, self.top_k)
        weights = 3 * self.num_retrieval_heads * chosen  # softplus, sum of the newer, exponential
        return batch_size * (seq_len * token + work.SOFTMAX * H * self.chunk_size * chosen + weights)

    @property
    def expectation(self) -> str:
        return f"hsa: a token reads {self.top_k} chunks of {self.chunk_size} keys, no two tokens of a call the same"

    def unread_bytes(self, batch_size: int, seq_len: int, context_len: int) -> int:
        token = 2 * self.num_kv_heads * self.head_dim * self.itemsize
        return batch_size * work.unread_keys(seq_len, context_len, self.top_k * self.chunk_size) * token

    def state_bytes(self, batch_size: int, max_len: int) -> int:
        width, itemsize = self.head_dim, self.itemsize
        landmarks = -(-max_len // self.chunk_size) * self.num_retrieval_heads * self.retrieval_dim * itemsize
        cache = kv_cache_bytes(batch_size, max_len, self.num_kv_heads, width, width, itemsize)
        return cache + batch_size * (landmarks + self.dim * max(itemsize, 4))

    def activation_elements(self, batch_size: int, seq_len: int) -> int:
        # x; k before a norm, k, v, o; the gate's queries and its scores of chunks; means of chunks and the gate's keys
        q_width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        chunks, heads = -(-seq_len // self.chunk_size), self.num_retrieval_heads
        n, tokens = min(self.top_k, chunks), batch_size * seq_len
        kept = tokens * (self.dim + 2 * q_width + 2 * kv_width + heads * self.retrieval_dim)
        kept += 0 if self.k_norm is None else self.k_norm.activation_elements(tokens * self.num_kv_heads)
        if len(self._parts(batch_size, seq_len, chunks)) == 1:  # else computed again, from queries
            # of each chosen chunk: queries, outputs twice, denominators; its number, score and weight, for heads and
            # groups
            chosen = 3 * q_width + 2 * self.num_heads + self.num_kv_heads + heads * 9 // 2
            kept += tokens * (n * chosen + heads * chunks - q_width)
        return kept + batch_size * chunks * (self.dim + heads * self.retrieval_dim)

    def parallel_plan(self) -> ParallelPlan:
        tensor = {"q_proj": "column", "k_proj": "column", "v_proj": "column", "o_proj": "row"}
        tensor |= {"retrieval_proj": "column", "landmark_proj": "column"}
        if self.k_norm is not None:
            tensor |= {"k_norm": "replicate"}
        return ParallelPlan(tensor, units=self.num_retrieval_heads, context="gather_input")
