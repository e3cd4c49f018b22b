"""Parallax: softmax attention corrected by a learned linear term, the local linear fit of values to keys.
arXiv:2605.29157; local linear attention: arXiv:2510.01450.

    p_ij = softmax_j(q_i . k_j / sqrt(D)),   u_ij = r_i . k_j,   r = W_R x
    o_i  = sum_j p_ij v_j - sum_j p_ij (u_ij - sum_l p_il u_il) v_j  =  E_p[v] - Cov_p(v, k) r_i
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
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
from zoo.kernels import work
from zoo.kernels.attention import QUERY_TILE, attention_flops
from zoo.kernels.attention.mask import Mask, Tile, tiles
from zoo.kernels.linear import Linear
from zoo.kernels.precision import no_autocast
from zoo.kernels.rope import rope
from zoo.kernels.slices import attention_keys
from zoo.registry import register
from zoo.row import current
from zoo.schema import PositiveFloat, PositiveInt


@register(
    "parallax",
    kind="mixer",
    paper="arXiv:2605.29157",
    ops=("rope",),
    state_growth="linear",
    relations=(
        "parallax(num_heads=4, num_kv_heads=4) == parallax(num_heads=4)",
        "parallax(num_heads=4, num_kv_heads=2) == attention(num_heads=4, num_kv_heads=2) at r_proj.weight=0",
    ),
    examples=({"num_heads": 4, "num_kv_heads": 2}, {"num_heads": 2, "head_dim": 12, "rope": False}),
)
class Parallax(Block):
    """Attention minus the covariance of values and keys under its weights, applied to a second query r.

    o = (1 + sum_j p_j u_j) sum_j p_j v_j - sum_j p_j u_j v_j with u_j = r . k_j unscaled; r has the heads, width and
    rotation of q. r_proj starts at zero: then it is attention, so it can replace attention in a trained model.
    With r = rho omega / (omega - mu . rho) of local linear attention it is that. One constant added to all values is
    added to o.
    x: [B, T, D] -> y: [B, T, D]. One and a half times the products of attention, a tile of queries at a time, which
    backward computes again. State: KV cache.
    Written from the published equation; the authors' code was not at hand.
    Useful: 6 H d FLOPs a causal pair.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: PositiveInt | None = None,
        num_kv_heads: PositiveInt | None = None,
        head_dim: PositiveInt | None = None,
        rope: bool = True,
        rope_base: PositiveFloat = 10000.0,
        device=None,
        dtype=None,
    ):
        super().__init__(dim)
        self.num_heads, self.num_kv_heads, self.head_dim = grouped_heads(
            dim, num_heads, num_kv_heads, head_dim, rotated=rope
        )
        self.rope_base = rope_base if rope else None
        factory = {"device": device, "dtype": dtype}
        q_width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q_proj = Linear(dim, q_width, bias=False, **factory)
        self.k_proj = Linear(dim, kv_width, bias=False, **factory)
        self.v_proj = Linear(dim, kv_width, bias=False, **factory)
        self.r_proj = Linear(dim, q_width, bias=False, **factory)
        self.o_proj = Linear(q_width, dim, bias=False, **factory)

    def reset_parameters(self) -> None:
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            init_linear_(linear)
        nn.init.zeros_(self.r_proj.weight)

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
        projections = (self.q_proj, self.r_proj, self.k_proj, self.v_proj)
        q, r, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in projections)
        if self.rope_base is not None:
            if positions is None:
                in_row = state is not None
                positions = segment_index(state.length, T) if in_row else positions_from(doc_ids, B, T, x.device)
            q, r, k = (rope(h, positions, base=self.rope_base) for h in (q, r, k))
        q_index = k_index = None
        if state is not None:
            empty = state.size == 0  # then the keys are those of the segment, in order
            k, v, k_index, q_index = state.append(k, v)
            if empty:
                q_index = k_index = None
        k_doc_ids = doc_ids
        if (part := current()) is not None:
            k, v, q_index, k_index, k_doc_ids = attention_keys(part, q, k, v, True, None, None, doc_ids)
        mask = Mask(True, None, 0, q_index, k_index, doc_ids, k_doc_ids)
        outputs = []
        for tile in tiles(T, k.shape[1], True, None, 0, mask.plain, fused=False):
            given = (tile.queries(q), tile.queries(r), tile.keys(k), tile.keys(v), mask, tile)
            recompute = T > QUERY_TILE and torch.is_grad_enabled()
            outputs.append(checkpoint(_masked_tile, *given, use_reentrant=False) if recompute else _masked_tile(*given))
        return self.o_proj(torch.cat(outputs, 1).flatten(2))

    def forward_flops(self, batch_size: int, seq_len: int, context_len: int = 0, streaming: bool = False) -> int:
        H, D = self.num_heads, self.head_dim
        flops = linear_flops(batch_size * seq_len, self.q_proj, self.k_proj, self.v_proj, self.r_proj, self.o_proj)
        keys = context_len + seq_len
        widths = (2 * D, D)  # two scores and one value
        return flops + attention_flops(batch_size, seq_len, keys, H, *widths, plain=not context_len, fused=False)

    def useful_flops(self, batch_size: int, seq_len: int, context_len: int = 0) -> int:
        H, D = self.num_heads, self.head_dim
        flops = linear_flops(batch_size * seq_len, self.q_proj, self.k_proj, self.v_proj, self.r_proj, self.o_proj)
        return flops + batch_size * work.attention_work(H, work.pairs(seq_len, context_len), 2 * D, D)

    def vector_flops(self, batch_size: int, seq_len: int, context_len: int = 0) -> int:
        H, Hkv, D = self.num_heads, self.num_kv_heads, self.head_dim
        token = 0 if self.rope_base is None else work.ROPE * (2 * H + Hkv) * D
        score = work.SOFTMAX + 4  # p u and its sum; 1 + sum - u, times p
        return batch_size * (seq_len * token + score * H * work.pairs(seq_len, context_len))

    def state_bytes(self, batch_size: int, max_len: int) -> int:
        return kv_cache_bytes(batch_size, max_len, self.num_kv_heads, self.head_dim, self.head_dim, self.itemsize)

    def activation_elements(self, batch_size: int, seq_len: int) -> int:
        # x; q, r and k rotated with their cos and sin, v; o. With one tile k once more, and scores, weights and both
        # factors of their product; of several only what they are computed from
        q_width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        token = self.dim + 3 * q_width + 2 * kv_width + (0 if self.rope_base is None else 3 * self.head_dim)
        if seq_len <= QUERY_TILE:
            token += 4 * self.num_heads * seq_len + kv_width
        return batch_size * seq_len * token

    def parallel_plan(self) -> ParallelPlan:
        tensor = {name: "column" for name in ("q_proj", "k_proj", "v_proj", "r_proj")} | {"o_proj": "row"}
        return ParallelPlan(tensor, units=self.num_kv_heads, context="gather_kv")


def _masked_tile(q: Tensor, r: Tensor, k: Tensor, v: Tensor, mask: Mask, tile: Tile) -> Tensor:
    """As `_tile`, all of a tile; its mask is made here, so that those of all tiles are never kept."""
    seen = mask.visible(tile, q.device)
    assert seen is not None  # causal
    return _tile(q, r, k, v, seen)


def _tile(q: Tensor, r: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Outputs [B, T, Hq, D] of queries q, r over keys [B, S, Hkv, D], of which `seen` [B or 1, T, S] are visible."""
    B, T, H, D = q.shape
    S, groups = k.shape[1:3]
    wide = state_dtype(q.dtype)
    with no_autocast(q.device):
        keys, values = k.to(wide).permute(0, 2, 3, 1), v.to(wide).transpose(1, 2)
        s, u = (
            (y.to(wide).unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3) @ keys).view(B, H, T, S)
            for y in (q * D**-0.5, r)
        )
        p = s.masked_fill(~seen[:, None], float("-inf")).softmax(-1)
        p = p * (1 + (p * u).sum(-1, keepdim=True) - u)
        o = (p.view(B, groups, -1, S) @ values).view(B, H, T, -1)
    return o.transpose(1, 2).to(q.dtype)
