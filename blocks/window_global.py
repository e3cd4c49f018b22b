"""Sliding window plus a bounded set of learned global tokens: the sparse attention of Hydra, arXiv:2508.15099,
made causal chunk by chunk.

    s_j  = w . x_j                                 score of a token, one for all heads
    G_c  = the num_globals best-scored tokens of the chunks before chunk c
    logits(t, j) = R_t q_t . R_j k_j / sqrt(D)                          for t - window < j <= t
                   q_t . k_j / sqrt(D) + log sigmoid(s_j)               for j in G_c(t), j <= t - window

One softmax over both. The bias gives the score head its gradient: no straight-through estimate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.blocks.heads import grouped_heads
from zoo.blocks.kv_cache import segment_index
from zoo.blocks.recurrent import previous
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
from zoo.kernels import sparse_attention as sparse
from zoo.kernels import work
from zoo.kernels.attention import attention, attention_flops
from zoo.kernels.block_list import BlockList
from zoo.kernels.dispatch import check_backend
from zoo.kernels.linear import Linear
from zoo.kernels.merge_lse import kept as merge_kept
from zoo.kernels.merge_lse import merge_lse
from zoo.kernels.precision import no_autocast
from zoo.kernels.prefix_topk import merge_topk, prefix_topk
from zoo.kernels.rope import rope
from zoo.kernels.slices import attention_keys
from zoo.kernels.sparse_attention import sparse_attention
from zoo.registry import register
from zoo.row import current
from zoo.schema import NonNegativeInt, PositiveFloat, PositiveInt
from zoo.segments import handed_on


@dataclass
class WindowGlobalState(State):
    """Ring of the last R = max(window, chunk_size) tokens, token j in slot j mod R, and the chosen globals,
    best first. Keys are not rotated: `position` rotates those of the ring. length: tokens seen, [B]. begun: 0 while
    no row has any."""

    k: Tensor  # [B, R, Hkv, D]
    v: Tensor
    position: Tensor  # [B, R]
    score: Tensor  # [B, R]
    length: Tensor
    global_k: Tensor  # [B, G, Hkv, D]
    global_v: Tensor
    global_score: Tensor = field(metadata={"fill": float("-inf")})  # [B, G]
    global_index: Tensor = field(metadata={"fill": -1})  # [B, G], order in the row, -1: empty
    begun: int = counter()


@register(
    "window_global",
    kind="mixer",
    paper="arXiv:2508.15099",
    ops=("sparse_attention", "attention", "prefix_topk", "merge_lse", "rope"),
    state_growth="constant",
    relations=(
        "window_global(num_globals=0, window=4096) == attention()",
        "window_global(num_globals=0, window=20) == attention(window=20)",
        "window_global(num_globals=8, chunk_size=16, window=4096) == attention()",
    ),
    examples=(
        {"num_heads": 4, "window": 12, "num_globals": 6, "chunk_size": 16},
        {"num_heads": 4, "num_kv_heads": 2, "window": 20, "num_globals": 40, "chunk_size": 8},
        {"num_heads": 2, "window": 16, "num_globals": 0},
    ),
)
class WindowGlobal(Block):
    """Causal window with rotary positions plus a bounded, learned set of global tokens without positions.

    A query of chunk c sees the last `window` tokens, and of the `num_globals` tokens with the largest score
    w . x among all chunks before c those that have left its window, unrotated and with log sigmoid(score) added
    to their logits. Chunks of `chunk_size` tokens are counted from each document's start.

    x: [B, T, D] -> y: [B, T, D]; 4 D^2 + D parameters; 4 D T (window + num_globals) FLOPs for attention.
    State: the last max(window, chunk_size) tokens and the globals, whatever T is. Exact, because the best of a
    growing prefix are found among the best so far and the new chunk. num_globals = 0 is windowed attention
    (no score head); a window of at least T is plain attention.
    Useful: 4 H d FLOPs for each key of the window and each global that has left it.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: PositiveInt | None = None,
        num_kv_heads: PositiveInt | None = None,
        head_dim: PositiveInt | None = None,
        window: PositiveInt = 256,
        num_globals: NonNegativeInt = 512,
        chunk_size: PositiveInt = 256,
        rope_base: PositiveFloat = 10000.0,
        kernel: str = "auto",
        device=None,
        dtype=None,
    ):
        super().__init__(dim)
        check_backend("sparse_attention", kernel)
        self.num_heads, self.num_kv_heads, self.head_dim = grouped_heads(
            dim, num_heads, num_kv_heads, head_dim, rotated=True
        )
        self.window, self.num_globals, self.chunk_size = window, num_globals, chunk_size
        self.rope_base, self.kernel = rope_base, kernel
        factory = {"device": device, "dtype": dtype}
        q_width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q_proj = Linear(dim, q_width, bias=False, **factory)
        self.k_proj = Linear(dim, kv_width, bias=False, **factory)
        self.v_proj = Linear(dim, kv_width, bias=False, **factory)
        self.o_proj = Linear(q_width, dim, bias=False, **factory)
        self.score_proj = Linear(dim, 1, bias=False, **factory) if num_globals else None

    def reset_parameters(self) -> None:
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.o_proj, self.score_proj):
            if linear is not None:
                init_linear_(linear)

    def forward(
        self,
        x: Tensor,
        *,
        state: WindowGlobalState | None = None,
        positions: Tensor | None = None,
        doc_ids: Tensor | None = None,
    ) -> Tensor:
        refuse_packed_streaming(state, doc_ids)
        B, T, _ = x.shape
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        score = self._score(x)
        order = positions_from(doc_ids, B, T, x.device) if state is None else segment_index(state.length, T)
        positions = order if positions is None else positions
        if state is None or not state.begun:
            o = self._parallel(q, k, v, score, order, positions, doc_ids)
            if state is not None:
                self._remember(k, v, score, positions, state)
        else:
            o = self._stream(q, k, v, score, positions, state)
        return self.o_proj(o.flatten(2))

    def _score(self, x: Tensor) -> Tensor:
        """[B, T] in fp32: in half precision many tokens would tie."""
        wide = state_dtype(x.dtype)
        if self.score_proj is None:
            return torch.zeros(x.shape[:2], dtype=wide, device=x.device)
        with no_autocast(x.device):
            return F.linear(x.to(wide), self.score_proj.weight.to(wide))[..., 0]

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        return rope(x, positions, base=self.rope_base)

    def _parallel(
        self, q: Tensor, k: Tensor, v: Tensor, score: Tensor, order: Tensor, positions: Tensor, doc_ids: Tensor | None
    ) -> Tensor:
        """All tokens at once; `order` counts inside each document."""
        B, T = order.shape
        need, part = self.num_globals > 0, current()
        rotated = self._rotate(q, positions), self._rotate(k, positions)
        docs: dict[str, Any] = {"q_doc_ids": doc_ids, "k_doc_ids": doc_ids}
        o, lse = attention(*rotated, v, window=self.window, **docs, need_lse=need, backend=self.kernel)
        if not need:
            return o
        size = self.chunk_size
        index = k_index = torch.arange(T, device=q.device).expand(B, T)
        k_doc_ids, tile = doc_ids, min(size, T)
        if part is not None:
            k, v, index, k_index, k_doc_ids = attention_keys(part, q, k, v, True, None, None, doc_ids)
            score, tile = part.gather(score)[:, : k.shape[1]], math.gcd(T, size)
        chosen = prefix_topk(score, self._listed(k.shape[1]), size, doc_ids=k_doc_ids)
        chunk = index[0, ::tile] // size  # of each tile of queries, which lies in one
        outside: dict[str, Any] = {
            "q_index": index - self.window,
            "k_index": k_index,
            "k_bias": F.logsigmoid(score)[..., None],
        }
        # the slot of prefix_topk that a token reads: that of the complete chunk before its own
        slot = torch.where(order >= size, (index - order % size) // size - 1, -1)
        outputs, lses = [o], [lse]
        # chunks that start with their documents need not be tiles of the row: a tile then meets two slots
        for back in (1,) if doc_ids is None else (1, 2):
            if back == 1 or chosen.shape[1] > 1:
                idx = F.pad(chosen, (0, 0, back, 0), value=-1)[:, None, chunk]
                mine: dict[str, Any] = {}
                if doc_ids is not None:
                    mine = {"q_doc_ids": (slot == index // size - back).long(), "k_doc_ids": torch.ones_like(k_index)}
                blocks = BlockList(idx, q_tile=tile)
                far = sparse_attention(q, k, v, blocks, **outside, **mine, backend=self.kernel)
                outputs.append(far[0])
                lses.append(far[1])
        return merge_lse(outputs, lses)[0]

    def _remember(self, k: Tensor, v: Tensor, score: Tensor, positions: Tensor, state: WindowGlobalState) -> None:
        """Fill an empty state with what streaming would have left in it."""
        (B, T), ring, whole = score.shape, state.k.shape[1], score.shape[1] // self.chunk_size * self.chunk_size
        slot = torch.arange(max(T - ring, 0), T, device=k.device) % ring
        for name, x in (("k", k), ("v", v), ("position", positions), ("score", score)):
            kept = getattr(state, name)
            kept.index_copy_(1, slot, handed_on(x[:, -ring:].expand(B, -1, *x.shape[2:])).to(kept.dtype))
        if self.num_globals and whole:
            token = torch.arange(whole, device=k.device).expand(B, whole)
            best = merge_topk(score[:, :whole].detach(), token, self.num_globals)[1]
            row, count = torch.arange(B, device=k.device)[:, None], best.shape[1]
            for name, x in (("global_k", k), ("global_v", v), ("global_score", score)):
                getattr(state, name)[:, :count].copy_(handed_on(x[row, best]))
            state.global_index[:, :count] = best
        state.length.fill_(T)
        state.begun = 1

    def _listed(self, seq_len: int) -> int:
        """Globals that can be in use in a sequence: those of all chunks but the last."""
        return max(1, min(self.num_globals, (seq_len - 1) // self.chunk_size * self.chunk_size))

    def _stream(
        self, q: Tensor, k: Tensor, v: Tensor, score: Tensor, positions: Tensor, state: WindowGlobalState
    ) -> Tensor:
        """Pieces of at most one chunk, so that each row ends at most one chunk in a piece. Inside the segment
        gradients flow; what the state holds from before has none."""
        names = ("k", "v", "position", "score", "length", "global_k", "global_v", "global_score", "global_index")
        now = {name: previous(getattr(state, name)) for name in names}
        outputs = []
        for piece in zip(*(y.split(self._piece, 1) for y in (q, k, v, score, positions))):
            o, now = self._step(*piece, WindowGlobalState(**now))
            outputs.append(o)
        for name, tensor in now.items():
            getattr(state, name).copy_(handed_on(tensor))
        return torch.cat(outputs, 1)

    def _step(
        self, q: Tensor, k: Tensor, v: Tensor, score: Tensor, positions: Tensor, old: WindowGlobalState
    ) -> tuple[Tensor, dict[str, Tensor]]:
        L, ring, row = q.shape[1], old.k.shape[1], torch.arange(q.shape[0], device=q.device)[:, None]
        index = segment_index(old.length, L)
        last = old.length[:, None] - 1
        held = last - (last - torch.arange(ring, device=q.device)) % ring  # token in each slot of the ring
        k_index = torch.cat([held.clamp(min=-1), index], 1)
        k_all, v_all = torch.cat([old.k.to(k.dtype), k], 1), torch.cat([old.v.to(v.dtype), v], 1)
        rotated = self._rotate(q, positions), self._rotate(k_all, torch.cat([old.position, positions], 1))
        near = {"window": self.window, "q_index": index, "k_index": k_index}
        o, lse = attention(*rotated, v_all, **near, need_lse=self.num_globals > 0, backend=self.kernel)
        new = {"k": k, "v": v, "position": positions, "score": score}
        now = {n: getattr(old, n).index_put((row, index % ring), x.to(getattr(old, n).dtype)) for n, x in new.items()}
        now["length"] = old.length + L
        chosen = {n: getattr(old, n) for n in ("global_k", "global_v", "global_score", "global_index")}
        if self.num_globals:
            # the chunk that is open before this piece, in order: from the ring, then from the piece
            start = old.length[:, None] // self.chunk_size * self.chunk_size
            token = start + torch.arange(self.chunk_size, device=q.device)
            at = torch.where(token <= last, token % ring, ring + token - old.length[:, None]).clamp(max=ring + L - 1)
            both = {"global_k": k_all, "global_v": v_all, "global_score": torch.cat([old.score, score], 1)}
            both["global_index"] = k_index
            pool = {n: torch.cat([x.to(both[n].dtype), both[n][row, at]], 1) for n, x in chosen.items()}
            slot = torch.arange(pool["global_index"].shape[1], device=q.device).expand_as(pool["global_index"])
            best = merge_topk(pool["global_score"].detach(), slot, self.num_globals)[1]
            merged = {n: x[row, best] for n, x in pool.items()}
            far = self._attend_globals(q, chosen, merged, index, start + self.chunk_size)
            o, lse = merge_lse([o, far[0]], [lse, far[1]])
            ends = (now["length"][:, None] >= start + self.chunk_size)[:, 0]  # the open chunk is complete now
            for n, x in chosen.items():
                chosen[n] = torch.where(ends.view(-1, *[1] * (x.dim() - 1)), merged[n].to(x.dtype), x)
        return o, now | chosen

    def _attend_globals(
        self, q: Tensor, before: dict[str, Tensor], after: dict[str, Tensor], index: Tensor, border: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Queries before `border` [B, 1] see the globals `before`, the others `after`."""
        if q.shape[1] == 1:  # one token never lies behind the end of the chunk that it continues
            g = {n: x.to(after[n].dtype) for n, x in before.items()}
            idx = torch.zeros_like(index)
        else:
            g = {n: torch.cat([x.to(after[n].dtype), after[n]], 1) for n, x in before.items()}
            idx = (index >= border).long()
        bias = F.logsigmoid(torch.where(g["global_index"] >= 0, g["global_score"], 0))[..., None]
        blocks = BlockList(idx.int()[:, None, :, None], kv_block=self.num_globals)
        masks: dict[str, Any] = {"q_index": index - self.window, "k_index": g["global_index"], "k_bias": bias}
        return sparse_attention(q, g["global_k"], g["global_v"], blocks, **masks, backend=self.kernel)

    @property
    def _piece(self) -> int:
        return self.chunk_size if self.num_globals else self.window

    @property
    def _ring(self) -> int:
        return max(self.window, self._piece)

    def init_state(self, batch_size: int, max_len: int | None = None) -> WindowGlobalState:
        like = self.reference_parameter.detach()
        B, R, G, shape = batch_size, self._ring, self.num_globals, (self.num_kv_heads, self.head_dim)
        score = like.new_zeros(B, R, dtype=state_dtype(like.dtype))
        return WindowGlobalState(
            k=like.new_zeros(B, R, *shape),
            v=like.new_zeros(B, R, *shape),
            position=score.new_zeros(B, R, dtype=torch.int64),
            score=score,
            length=score.new_zeros(B, dtype=torch.int64),
            global_k=like.new_zeros(B, G, *shape),
            global_v=like.new_zeros(B, G, *shape),
            global_score=score.new_full((B, G), float("-inf")),
            global_index=score.new_full((B, G), -1, dtype=torch.int64),
        )

    def forward_flops(self, batch_size: int, seq_len: int, context_len: int = 0, streaming: bool = False) -> int:
        B, G, heads, size = batch_size, self.num_globals, (self.num_heads, self.num_kv_heads), self.head_dim
        projections = (self.q_proj, self.k_proj, self.v_proj, self.o_proj, self.score_proj)
        flops = linear_flops(B * seq_len, *projections)
        fused = not G and self.kernel == "auto"
        if not context_len:
            flops += attention_flops(B, seq_len, seq_len, heads[0], size, window=self.window, fused=fused)
            tile = min(self.chunk_size, seq_len)
            far = (B, seq_len, seq_len, *heads, size, size, self._listed(seq_len), 1, 1, tile)
            return flops + (sparse.flops(*far) if G else 0)
        for start in range(0, seq_len, self._piece):
            L = min(self._piece, seq_len - start)
            near = (B, L, self._ring + L, heads[0], size)
            flops += attention_flops(*near, window=self.window, plain=False, fused=fused)
            flops += sparse.flops(B, L, G if L == 1 else 2 * G, *heads, size, size, 1, G, 1) if G else 0
        return flops

    def useful_flops(self, batch_size: int, seq_len: int, context_len: int = 0) -> int:
        projections = (self.q_proj, self.k_proj, self.v_proj, self.o_proj, self.score_proj)
        attend = work.attention_work(self.num_heads, self._pairs(seq_len, context_len), self.head_dim, self.head_dim)
        return linear_flops(batch_size * seq_len, *projections) + batch_size * attend

    def _pairs(self, seq_len: int, context_len: int) -> int:
        """Keys that a row's queries read: the window's, and as many globals as have left it."""
        near = work.window_pairs(seq_len, context_len, self.window)
        left = max(0, context_len - self.window)
        late = max(0, context_len + seq_len - self.window) - left
        return near + (work.pairs(late, left, self.num_globals) if self.num_globals else 0)

    def vector_flops(self, batch_size: int, seq_len: int, context_len: int = 0) -> int:
        H, Hkv, D = self.num_heads, self.num_kv_heads, self.head_dim
        token = work.ROPE * (H + Hkv) * D + (self.num_globals > 0)  # log sigmoid of the score
        return batch_size * (seq_len * token + work.SOFTMAX * H * self._pairs(seq_len, context_len))

    def pieces(self, seq_len: int, streaming: bool = False) -> int:
        return -(-seq_len // self._piece) if streaming else 1

    def state_bytes(self, batch_size: int, max_len: int) -> int:
        R, G, itemsize = self._ring, self.num_globals, self.itemsize
        per_slot = 2 * self.num_kv_heads * self.head_dim * itemsize + 8 + max(itemsize, 4)
        return batch_size * ((R + G) * per_slot + 8)

    def activation_elements(self, batch_size: int, seq_len: int) -> int:
        # x; q and k rotated, with cos and sin, v; o and its denominators
        q_width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        token = self.dim + 2 * q_width + 2 * kv_width + 2 * self.head_dim + self.num_heads
        if self.num_globals:  # q and k not rotated, the other output, what merging keeps, y; scores, order and lists
            token += 3 * q_width + kv_width + self.num_heads + merge_kept(2, self.num_heads, self.head_dim) + 5
            token += self._listed(seq_len) // min(self.chunk_size, seq_len)
        return batch_size * seq_len * token

    def parallel_plan(self) -> ParallelPlan:
        tensor = {"q_proj": "column", "k_proj": "column", "v_proj": "column", "o_proj": "row"}
        if self.score_proj is not None:
            tensor |= {"score_proj": "replicate"}
        return ParallelPlan(tensor, units=self.num_kv_heads, context="gather_kv")
