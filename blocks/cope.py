"""Contextual position encoding: a token's distance is the number of tokens between that the query counts.
Golovneva et al. 2024, arXiv:2405.18719.

    g_ij = sigmoid(q_i . k_j / sqrt(D))
    p_ij = min(sum_{l=j..i} g_il, P - 1)               fractional: e[p] lies between the embeddings around it
    o_i  = sum_j softmax_j(q_i . (k_j + e[p_ij]) / sqrt(D)) v_j
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zoo.blocks.heads import grouped_heads
from zoo.blocks.kv_cache import KVCache, kv_cache_bytes
from zoo.contract import Block, ParallelPlan, init_linear_, linear_flops, refuse_packed_streaming, state_dtype
from zoo.kernels import work
from zoo.kernels.attention import QUERY_TILE, attention_flops
from zoo.kernels.attention.mask import Mask, Tile, tiles
from zoo.kernels.linear import Linear
from zoo.kernels.precision import no_autocast
from zoo.kernels.slices import attention_keys
from zoo.registry import register
from zoo.row import current
from zoo.schema import PositiveInt


@register(
    "cope",
    kind="mixer",
    paper="arXiv:2405.18719",
    state_growth="linear",
    relations=(
        "cope(num_positions=1) == attention(rope=False)",
        "cope(num_heads=4, num_kv_heads=2, num_positions=1) == attention(num_heads=4, num_kv_heads=2, rope=False)",
        "cope(num_heads=4) == attention(num_heads=4, rope=False) at pos_emb=0",
    ),
    examples=(
        {"num_heads": 4, "num_kv_heads": 2, "num_positions": 16},
        {"num_heads": 2, "head_dim": 12, "num_positions": 5},
    ),
)
class ContextualPositionAttention(Block):
    """Attention that counts positions by content, as words, sentences or whatever its queries single out (CoPE).

    p_ij = sum of the gates sigmoid(q_i k_l / sqrt(D)) over l = j..i, at most num_positions - 1; the score is
    q_i (k_j + e[p_ij]) / sqrt(D) with e interpolated between whole positions, one table for all heads.
    x: [B, T, D] -> y: [B, T, D]. The T^2 gates and places are written out, for a tile of queries at a time, which
    backward computes again. The table starts at zero. State: KV cache; a decoded token counts anew over all of it.
    num_positions = 1, or a table of equal embeddings, is attention without position; gates of 1 give p = i - j + 1.
    Useful: 4 H d FLOPs a causal pair and 2 H d num_positions a token.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: PositiveInt | None = None,
        num_kv_heads: PositiveInt | None = None,
        head_dim: PositiveInt | None = None,
        num_positions: PositiveInt = 64,
        device=None,
        dtype=None,
    ):
        super().__init__(dim)
        self.num_heads, self.num_kv_heads, self.head_dim = grouped_heads(dim, num_heads, num_kv_heads, head_dim)
        self.num_positions = num_positions
        factory = {"device": device, "dtype": dtype}
        q_width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q_proj = Linear(dim, q_width, bias=False, **factory)
        self.k_proj = Linear(dim, kv_width, bias=False, **factory)
        self.v_proj = Linear(dim, kv_width, bias=False, **factory)
        self.o_proj = Linear(q_width, dim, bias=False, **factory)
        self.pos_emb = nn.Parameter(torch.empty(1, self.head_dim, num_positions, **factory))

    def reset_parameters(self) -> None:
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            init_linear_(linear)
        nn.init.zeros_(self.pos_emb)

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
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
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
        for tile in tiles(q.shape[1], k.shape[1], True, None, 0, mask.plain, fused=False):
            given = (tile.queries(q), tile.keys(k), tile.keys(v), mask, tile)
            recompute = q.shape[1] > QUERY_TILE and torch.is_grad_enabled()
            outputs.append(checkpoint(self._tile, *given, use_reentrant=False) if recompute else self._tile(*given))
        return self.o_proj(torch.cat(outputs, 1).flatten(2))

    def _tile(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, tile: Tile) -> Tensor:
        """Outputs [B, T, Hq, D] of queries q over keys [B, S, Hkv, D], both those of the tile."""
        seen = mask.visible(tile, q.device)  # here, so that masks of all tiles are never kept
        assert seen is not None  # causal
        B, T, H, D = q.shape
        S, groups = k.shape[1:3]
        wide, seen = state_dtype(q.dtype), seen[:, None]
        with no_autocast(q.device):
            rows = q.to(wide).unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4).reshape(B, groups, -1, D) * D**-0.5
            s = (rows @ k.to(wide).permute(0, 2, 3, 1)).view(B, H, T, S)
            gate = s.sigmoid().masked_fill(~seen, 0)
            place = gate.flip(-1).cumsum(-1).flip(-1).clamp(max=self.num_positions - 1)
            below = place.detach().long()
            share = place - below
            of_place = (rows @ self.pos_emb.to(wide)).view(B, H, T, -1)
            above = (below + 1).clamp(max=self.num_positions - 1)
            bias = torch.lerp(of_place.gather(-1, below), of_place.gather(-1, above), share)
            p = (s + bias).masked_fill(~seen, float("-inf")).softmax(-1)
            o = (p.view(B, groups, -1, S) @ v.to(wide).transpose(1, 2)).view(B, H, T, -1)
        return o.transpose(1, 2).to(q.dtype)

    def forward_flops(self, batch_size: int, seq_len: int, context_len: int = 0, streaming: bool = False) -> int:
        H, D = self.num_heads, self.head_dim
        flops = linear_flops(batch_size * seq_len, self.q_proj, self.k_proj, self.v_proj, self.o_proj)
        flops += 2 * batch_size * seq_len * H * D * self.num_positions
        keys = context_len + seq_len
        return flops + attention_flops(batch_size, seq_len, keys, H, D, plain=not context_len, fused=False)

    def useful_flops(self, batch_size: int, seq_len: int, context_len: int = 0) -> int:
        H, D = self.num_heads, self.head_dim
        flops = linear_flops(batch_size * seq_len, self.q_proj, self.k_proj, self.v_proj, self.o_proj)
        flops += 2 * batch_size * seq_len * H * D * self.num_positions
        return flops + batch_size * work.attention_work(H, work.pairs(seq_len, context_len), D, D)

    def vector_flops(self, batch_size: int, seq_len: int, context_len: int = 0) -> int:
        # the gate, its sum, the score between two places (a difference, a product, a sum), added
        score = work.SOFTMAX + work.SIGMOID + 1 + 3 + 1
        return batch_size * score * self.num_heads * work.pairs(seq_len, context_len)

    def state_bytes(self, batch_size: int, max_len: int) -> int:
        return kv_cache_bytes(batch_size, max_len, self.num_kv_heads, self.head_dim, self.head_dim, self.itemsize)

    def activation_elements(self, batch_size: int, seq_len: int) -> int:
        # x; q and k as they are scored, v, o
        q_width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        token = self.dim + 2 * q_width + 2 * kv_width
        if seq_len <= QUERY_TILE:
            # gates, places, both neighbours as int64, their biases, the share, weights; biases of all places
            token += self.num_heads * (10 * seq_len + self.num_positions)
        return batch_size * seq_len * token

    def parallel_plan(self) -> ParallelPlan:
        tensor = {"q_proj": "column", "k_proj": "column", "v_proj": "column", "o_proj": "row", "pos_emb": "replicate"}
        return ParallelPlan(tensor, units=self.num_kv_heads, context="gather_kv")
