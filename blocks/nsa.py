"""Native sparse attention: compressed keys, the best blocks of keys, and a sliding window, each behind a gate.
Yuan et al. 2025, arXiv:2502.11089.

    kc_c = phi_k(window c), vc_c = phi_v(window c)              l tokens each, starting every d tokens
    p_t  = softmax(q_t . kc / sqrt(D)) over the windows complete at t
    S(t) = the n blocks with the most p_t, summed over the heads of the group
    o_t  = g1 attn(q_t; kc, vc) + g2 attn(q_t; K[S], V[S]) + g3 attn(q_t; last w tokens),   g = sigmoid(W_g x_t)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.blocks.compression import CompressedSelection, write_slots
from zoo.blocks.heads import grouped_heads
from zoo.blocks.kv_cache import KVCache, RingKVCache, kv_cache_bytes, ring_slots, segment_index
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
from zoo.kernels.dispatch import check_backend
from zoo.kernels.linear import Linear
from zoo.kernels.rope import rope
from zoo.kernels.sparse_attention import sparse_attention
from zoo.registry import register
from zoo.schema import NonNegativeInt, PositiveFloat, PositiveInt
from zoo.segments import handed_on


@dataclass
class NSAState(State):
    """Every key and value of the selected branch, the last `window` of the window branch, the compressed ones
    [B, slots, Hkv, D], and the last kernel_size - 1 inputs of compression [B, kernel_size - 1, Hkv, D]."""

    cache: KVCache
    ring: RingKVCache
    k: Tensor
    v: Tensor
    k_tail: Tensor
    v_tail: Tensor


class WindowMLP(nn.Module):
    """phi: the tokens of a window, each with a learnt vector of its place, through one hidden layer."""

    def __init__(self, size: int, width: int, **factory):
        super().__init__()
        self.place = nn.Parameter(torch.empty(size, width, **factory))
        self.up_proj = Linear(size * width, width, bias=False, **factory)
        self.down_proj = Linear(width, width, bias=False, **factory)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.place, std=0.02)
        init_linear_(self.up_proj)
        init_linear_(self.down_proj)

    def forward(self, windows: Tensor) -> Tensor:
        """[B, N, size, H, width] -> [B, N, H, width]."""
        tokens = windows.transpose(2, 3) + self.place
        return self.down_proj(F.silu(self.up_proj(tokens.flatten(3))))


@register(
    "nsa",
    kind="mixer",
    paper="arXiv:2502.11089",
    ops=("attention", "sparse_attention", "block_scores", "select", "rope"),
    state_growth="linear",
    relations=(
        "nsa(block_size=16, top_k=99) == nsa(block_size=4096)",
        "nsa(window=70) == nsa(window=4096)",
        "nsa(num_heads=4, num_kv_heads=4, top_k=3, block_size=16) == nsa(num_heads=4, top_k=3, block_size=16)",
        "nsa(num_heads=4, num_kv_heads=1, compression='mean', block_size=16, top_k=99, window=4096) == "
        "attention(num_heads=4, num_kv_heads=1) at g_proj.weight=0, v_proj.weight[:16]=0, "
        "v_proj.weight[16:32]=v_proj.weight, v_proj.weight[32:]=v_proj.weight, "
        "k_proj.weight[16:32]=k_proj.weight, k_proj.weight[32:]=k_proj.weight",
    ),
    examples=(
        {"num_heads": 4, "num_kv_heads": 2, "kernel_size": 8, "kernel_stride": 4, "block_size": 16, "top_k": 3,
         "window": 20},
        {"num_heads": 4, "num_kv_heads": 1, "compression": "mean", "shared_kv": True, "kernel_size": 8,
         "kernel_stride": 8, "block_size": 8, "top_k": 4, "window": 16},
        {"num_heads": 2, "rope": False, "kernel_size": 6, "kernel_stride": 2, "block_size": 4, "top_k": 5, "window": 9,
         "v_head_dim": 16},
    ),
)  # fmt: skip
class NativeSparseAttention(Block):
    """Three branches of attention behind sigmoid gates of each query head: compressed, selected, sliding window.

    Compressed: windows of l = kernel_size tokens every d = kernel_stride, each made one key and value by an MLP
    over the window (un-rotated keys; the result is rotated at the window's last token), or by their mean (rotated
    keys). Selected: a group's n = top_k blocks of block_size tokens, of which init_blocks first ones, the own
    and local_blocks - 1 before it always; the rest by sum_h p_h over windows, times the strides shared with the
    block. Selection has no gradient. Window: the last `window` tokens. Each branch has keys and values of its own
    (rows of k_proj, v_proj: head, branch, channel), or with `shared_kv` all have the same.
    x: [B, T, D] -> y: [B, T, D]. T^2 / d work for compression and scores, T n block_size for the selected blocks,
    T window for the window. State: 2 Hkv head_dim a token and again a stride, and a window; a decoded token reads
    t / d + n block_size + window of it. The selected branch is attention where n covers all blocks, the window
    branch where window >= T.
    The authors released no code: the form of the MLP (one hidden layer of the head's width, shared by the heads)
    and where its keys are rotated are ours. The layer of flash-linear-attention is compression="mean",
    shared_kv=True and kernel_size = kernel_stride = block_size.
    Useful: 4 H d FLOPs for each complete window, chosen key and near key; the choice reads the compressed weights.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: PositiveInt | None = None,
        num_kv_heads: PositiveInt | None = None,
        head_dim: PositiveInt | None = None,
        v_head_dim: PositiveInt | None = None,
        compression: Literal["mlp", "mean"] = "mlp",
        shared_kv: bool = False,
        kernel_size: PositiveInt = 32,
        kernel_stride: PositiveInt = 16,
        block_size: PositiveInt = 64,
        top_k: PositiveInt = 16,
        init_blocks: NonNegativeInt = 1,
        local_blocks: PositiveInt = 2,
        window: PositiveInt = 512,
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
        self.v_head_dim = v_head_dim or self.head_dim
        check_backend("sparse_attention", kernel)
        self.rule = CompressedSelection(
            kernel_size, kernel_stride, block_size, top_k, init_blocks, local_blocks, pool="sum"
        )
        self.block_size, self.window, self.kernel = block_size, window, kernel
        self.rope_base = rope_base if rope else None
        self.kv_branches = 1 if shared_kv else 3
        factory = {"device": device, "dtype": dtype}
        kv_heads = self.num_kv_heads * self.kv_branches
        self.q_proj = Linear(dim, self.num_heads * self.head_dim, bias=False, **factory)
        self.k_proj = Linear(dim, kv_heads * self.head_dim, bias=False, **factory)
        self.v_proj = Linear(dim, kv_heads * self.v_head_dim, bias=False, **factory)
        self.g_proj = Linear(dim, self.num_heads * 3, bias=False, **factory)
        self.o_proj = Linear(self.num_heads * self.v_head_dim, dim, bias=False, **factory)
        self.compress_k = self.compress_v = None
        if compression == "mlp":
            self.compress_k = WindowMLP(kernel_size, self.head_dim, **factory)
            self.compress_v = WindowMLP(kernel_size, self.v_head_dim, **factory)

    def reset_parameters(self) -> None:
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.g_proj, self.o_proj):
            init_linear_(linear)
        for mlp in (self.compress_k, self.compress_v):
            if mlp is not None:
                mlp.reset_parameters()

    def forward(
        self,
        x: Tensor,
        *,
        state: NSAState | None = None,
        positions: Tensor | None = None,
        doc_ids: Tensor | None = None,
    ) -> Tensor:
        refuse_packed_streaming(state, doc_ids)
        B, T, _ = x.shape
        index = torch.arange(T, device=x.device).expand(B, T)
        if state is not None:
            index = segment_index(state.cache.length, T)
        if positions is None:
            positions = index if doc_ids is None else positions_from(doc_ids, B, T, x.device)
        q, keys, values, raw = self._project(x, positions)
        (k, k_near), (v, v_near), num_keys = keys[1:], values[1:], T
        q_index = q_near = k_index = k_near_index = None
        if state is not None:
            empty = state.ring.size == 0  # then the window's keys are those of the segment, in order
            k, v, k_index, q_index = state.cache.append(k, v)
            k_near, v_near, k_near_index, q_near = state.ring.append(k_near, v_near)
            num_keys = state.cache.size
            if empty:
                q_near = k_near_index = None
        kc, vc, end = self._compress(raw, values[0], index, positions, state, doc_ids)
        end_ids = None if doc_ids is None else doc_ids.gather(1, end.clamp(min=0))
        blocks = self.rule.select(q, kc, end, index, num_keys, doc_ids)
        compressed, _ = attention(q, kc, vc, q_index=index, k_index=end, q_doc_ids=doc_ids, k_doc_ids=end_ids)
        selected, _ = sparse_attention(
            q, k, v, blocks, q_index=q_index, k_index=k_index, q_doc_ids=doc_ids, k_doc_ids=doc_ids, backend=self.kernel
        )
        window, _ = attention(
            q, k_near, v_near, window=self.window, q_index=q_near, k_index=k_near_index, q_doc_ids=doc_ids,
            k_doc_ids=doc_ids,
        )  # fmt: skip
        gates = torch.sigmoid(self.g_proj(x)).unflatten(-1, (-1, 3, 1)).unbind(3)
        o = gates[0] * compressed + gates[1] * selected + gates[2] * window
        return self.o_proj(o.flatten(2))

    def _project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...], Tensor]:
        """q; keys and values of the branches; the keys that compression reads."""
        q, k = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj))
        v, raw = self.v_proj(x).unflatten(-1, (-1, self.v_head_dim)), k
        if self.rope_base is not None:
            q, k = (rope(h, positions, base=self.rope_base) for h in (q, k))
        if self.compress_k is None:
            raw = k
        k, v, raw = (h.unflatten(2, (-1, self.kv_branches)).unbind(3) for h in (k, v, raw))
        return q, k * (3 // len(k)), v * (3 // len(v)), raw[0]  # shared ones, three times

    def _compress(
        self,
        k: Tensor,
        v: Tensor,
        index: Tensor,
        positions: Tensor,
        state: NSAState | None,
        doc_ids: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compressed keys and values [B, N, Hkv, D] and the last token of each window [B, N], -1 for none."""
        rule, T = self.rule, k.shape[1]
        if state is None:
            start = rule.starts(T, doc_ids, k)
            last = start + rule.kernel_size - 1
            end = torch.where(start >= 0, last, -1)
        else:
            slots = rule.new_slots(index[:, 0], T)
            start = slots * rule.kernel_stride - index[:, :1] + rule.kernel_size - 1  # in what the tail and x hold
            last = start  # in x
            k, v = torch.cat([state.k_tail.to(k.dtype), k], 1), torch.cat([state.v_tail.to(v.dtype), v], 1)
            state.k_tail.copy_(handed_on(k[:, T:]))
            state.v_tail.copy_(handed_on(v[:, T:]))
        k, v = rule.gather(k, start), rule.gather(v, start)
        if self.compress_k is None or self.compress_v is None:
            wide = state_dtype(k.dtype)
            k, v = k.mean(2, dtype=wide).to(k.dtype), v.mean(2, dtype=wide).to(v.dtype)
        else:
            k, v = self.compress_k(k), self.compress_v(v)
            if self.rope_base is not None:
                k = rope(k, positions.gather(1, last.clamp(0, T - 1)), base=self.rope_base)
        if state is None:
            return k, v, end
        missing = rule.num_slots(state.cache.k.shape[1]) - state.k.shape[1]
        if missing > 0:
            state.k, state.v = (F.pad(h, (0, 0, 0, 0, 0, missing)) for h in (state.k, state.v))
        used = rule.num_slots(state.cache.size)
        k, v = write_slots(state.k, k, slots, used), write_slots(state.v, v, slots, used)
        return k, v, rule.ends(state.cache.length, state.cache.size)

    def init_state(self, batch_size: int, max_len: int | None = None) -> NSAState:
        heads, k_dim, v_dim = self.num_kv_heads, self.head_dim, self.v_head_dim
        like = self.reference_parameter.detach()
        cache = KVCache.create(batch_size, max_len, heads, k_dim, v_dim, like=like)
        ring = RingKVCache.create(batch_size, max_len, heads, k_dim, v_dim, window=self.window, like=like)
        lengths = (self.rule.num_slots(cache.k.shape[1]), self.rule.kernel_size - 1)
        buffers = (like.new_zeros(batch_size, n, heads, d) for n in lengths for d in (k_dim, v_dim))
        return NSAState(cache, ring, *buffers)

    def forward_flops(self, batch_size: int, seq_len: int, context_len: int = 0, streaming: bool = False) -> int:
        B, T, Hq, Hkv = batch_size, seq_len, self.num_heads, self.num_kv_heads
        dims, rule = (self.head_dim, self.v_head_dim), self.rule
        keys = near = T + (context_len if streaming else 0)
        if context_len and streaming:
            near = min(keys, self.window) if T == 1 else min(context_len, self.window) + T
        windows = rule.num_slots(keys)
        flops = linear_flops(B * T, self.q_proj, self.k_proj, self.v_proj, self.g_proj, self.o_proj)
        for mlp in (self.compress_k, self.compress_v):
            if mlp is not None:
                flops += linear_flops(B * rule.num_slots(T) * Hkv, mlp.up_proj, mlp.down_proj)
        flops += scoring.flops(B, T, windows, Hq, self.head_dim)
        flops += attention_flops(B, T, windows, Hq, *dims, plain=False)
        flops += attending.flops(B, T, keys, Hq, Hkv, *dims, rule.num_listed(keys), self.block_size, Hkv)
        return flops + attention_flops(B, T, near, Hq, *dims, window=self.window, plain=not (context_len and streaming))

    def useful_flops(self, batch_size: int, seq_len: int, context_len: int = 0) -> int:
        B, T, Hq, Hkv, rule = batch_size, seq_len, self.num_heads, self.num_kv_heads, self.rule
        flops = linear_flops(B * T, self.q_proj, self.k_proj, self.v_proj, self.g_proj, self.o_proj)
        new = [work.complete_windows(n, rule.kernel_stride, rule.kernel_size) for n in (context_len + T, context_len)]
        for mlp in (self.compress_k, self.compress_v):
            if mlp is not None:
                flops += linear_flops(B * (new[0] - new[1]) * Hkv, mlp.up_proj, mlp.down_proj)
        # selection reads the weights that compressed attention has
        return flops + B * work.attention_work(Hq, self._pairs(T, context_len), self.head_dim, self.v_head_dim)

    def _pairs(self, seq_len: int, context_len: int) -> int:
        """Keys that a row's queries read in the three branches."""
        rule = self.rule
        compressed = work.window_scores(seq_len, context_len, rule.kernel_stride, rule.kernel_size)
        selected = work.block_pairs(seq_len, context_len, self.block_size, rule.top_k)
        return compressed + selected + work.window_pairs(seq_len, context_len, self.window)

    def vector_flops(self, batch_size: int, seq_len: int, context_len: int = 0) -> int:
        H, Hkv, D, Dv = self.num_heads, self.num_kv_heads, self.head_dim, self.v_head_dim
        token = 0 if self.rope_base is None else work.ROPE * (H + Hkv * self.kv_branches) * D
        token += H * (3 * work.SIGMOID + 5 * Dv)  # gates, three products and their sum
        token += Hkv * (D + Dv) * self.rule.kernel_size // self.rule.kernel_stride  # places, or sums of the means
        scores = H * self._pairs(seq_len, context_len)
        return batch_size * (seq_len * token + work.SOFTMAX * scores)

    @property
    def expectation(self) -> str:
        return (
            f"nsa: a group reads {self.rule.top_k} blocks of {self.block_size} keys, no two tokens of a call the same"
        )

    def unread_bytes(self, batch_size: int, seq_len: int, context_len: int) -> int:
        token = self.num_kv_heads * (self.head_dim + self.v_head_dim) * self.itemsize
        return batch_size * work.unread_keys(seq_len, context_len, self.rule.top_k * self.block_size) * token

    def state_bytes(self, batch_size: int, max_len: int) -> int:
        dims, itemsize = (self.num_kv_heads, self.head_dim, self.v_head_dim), self.itemsize
        slots = self.rule.num_slots(max_len) + self.rule.kernel_size - 1
        cache = kv_cache_bytes(batch_size, max_len, *dims, itemsize)
        ring = kv_cache_bytes(batch_size, ring_slots(max_len, self.window), *dims, itemsize)
        return cache + ring + batch_size * slots * self.num_kv_heads * (self.head_dim + self.v_head_dim) * itemsize

    def activation_elements(self, batch_size: int, seq_len: int) -> int:
        # x; q, keys and values of each branch, those of the window once more; cos and sin; three outputs with
        # denominators and gates, their sum; lists and order
        o, kv = self.num_heads * self.v_head_dim, self.num_kv_heads * (self.head_dim + self.v_head_dim)
        rotary = 0 if self.rope_base is None else self.head_dim
        token = self.dim + self.num_heads * (self.head_dim + 6) + 4 * o
        token += (
            kv * (self.kv_branches + (self.kv_branches > 1))
            + 2 * rotary
            + self.num_kv_heads * self.rule.num_listed(seq_len)
            + 2
        )
        # a window: its tokens for k and for v as int64, its order; its key and value; with a network its tokens, both
        # layers and the rotation
        window = 4 * self.rule.kernel_size + 2 + kv
        if self.compress_k is not None:
            window += kv * (self.rule.kernel_size + 2) + rotary
        return batch_size * (seq_len * token + self.rule.num_slots(seq_len) * window)

    def parallel_plan(self) -> ParallelPlan:
        tensor = {"q_proj": "column", "k_proj": "column", "v_proj": "column", "g_proj": "column", "o_proj": "row"}
        if self.compress_k is not None:
            tensor |= {"compress_k": "replicate", "compress_v": "replicate"}
        return ParallelPlan(tensor, units=self.num_kv_heads, context="gather_input")
