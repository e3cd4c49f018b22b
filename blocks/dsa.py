"""DeepSeek sparse attention: multi-head latent attention over the tokens that a lightning indexer ranks first.
DeepSeek-V3.2 2025, arXiv:2512.02556.

    I_ts = sum_h w_th relu(qI_th . kI_s)          few narrow heads, one key for all of them
    S(t) = the top_k tokens s <= t with the largest I_ts
    o_t  = MLA of token t over the latents of S(t), one list for all heads
    L    = mean_t KL(p_t || softmax(I_t,S(t))),  p_t = the heads' mean attention over S(t)

Selection has no gradient: the indexer learns from L alone, and L teaches nothing but the indexer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from zoo.blocks.kv_cache import KVCache, kv_cache_bytes, segment_index
from zoo.blocks.measure import recording
from zoo.blocks.mla import MultiHeadLatentAttention
from zoo.blocks.norms import LayerNorm
from zoo.contract import (
    ParallelPlan,
    add_auxiliary_loss,
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
from zoo.kernels.precision import no_autocast
from zoo.kernels.rope import rope
from zoo.kernels.select import select
from zoo.kernels.sparse_attention import sparse_attention
from zoo.registry import register
from zoo.schema import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

ELEMENTS_AT_ONCE = 1 << 24  # of the tables of scores, so that they are never whole


class LightningIndexer(nn.Module):
    """I_ts = sum_h w_th relu(qI_th . kI_s) / sqrt(heads * head_dim), in fp32; the first `rotary_dim` channels of qI
    and kI are rotated, in halves. The released code also turns both by a Hadamard matrix, which changes no product,
    and rounds them to FP8."""

    def __init__(
        self, dim: int, query_dim: int, num_heads: int, head_dim: int, rotary_dim: int, rope_options: dict, **factory
    ):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        self.rope_options = {**rope_options, "rotary_dim": rotary_dim, "interleaved": False}
        self.wq_b = Linear(query_dim, num_heads * head_dim, bias=False, **factory)
        self.wk = Linear(dim, head_dim, bias=False, **factory)
        self.k_norm = LayerNorm(head_dim, eps=1e-6, **factory)
        self.weights_proj = Linear(dim, num_heads, bias=False, **factory)

    def reset_parameters(self) -> None:
        for linear in (self.wq_b, self.wk, self.weights_proj):
            init_linear_(linear)
        self.k_norm.reset_parameters()

    def keys(self, x: Tensor, positions: Tensor) -> Tensor:
        """kI [B, T, 1, head_dim]."""
        return rope(self.k_norm(self.wk(x))[:, :, None], positions, **self.rope_options)

    def queries(self, x: Tensor, query_input: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """qI [B, T, heads, head_dim] and w [B, T, heads]."""
        q = self.wq_b(query_input).unflatten(-1, (self.num_heads, self.head_dim))
        w = self.weights_proj(x) * (self.num_heads * self.head_dim) ** -0.5
        return rope(q, positions, **self.rope_options), w

    def scores(self, q: Tensor, w: Tensor, k: Tensor) -> Tensor:
        """I [B, T, S] of keys [B, S, head_dim], or of each query's own keys [B, T, S, head_dim]."""
        wide = state_dtype(q.dtype)
        q, w, k = q.to(wide), w.to(wide), k.to(wide)
        with no_autocast(q.device):
            z = (q @ k.mT) if k.dim() == 4 else (q.flatten(1, 2) @ k.mT).unflatten(1, q.shape[1:3])
            return (w[:, :, None] @ F.relu(z)).squeeze(2)

    def flops(self, tokens: int, keys: int, *, select: bool) -> int:
        """Matrix FLOPs of the keys of `tokens` new tokens and, with `select`, of scoring `keys` keys for each."""
        flops = linear_flops(tokens, self.wk)
        if select:
            flops += linear_flops(tokens, self.wq_b, self.weights_proj)
            flops += 2 * tokens * keys * self.num_heads * (self.head_dim + 1)
        return flops

    def useful_flops(self, tokens: int, pairs: int) -> int:
        """Of `tokens` new tokens that score `pairs` keys."""
        linears = linear_flops(tokens, self.wk, self.wq_b, self.weights_proj)
        return linears + 2 * pairs * self.num_heads * (self.head_dim + 1)

    def vector_flops(self, tokens: int, pairs: int) -> int:
        """The key's norm, rotations, relu of the scores."""
        turned = work.ROPE * self.rope_options["rotary_dim"] * (self.num_heads + 1)
        return tokens * (work.LAYER * self.head_dim + turned) + self.num_heads * pairs


@register(
    "dsa",
    kind="mixer",
    paper="arXiv:2512.02556",
    ops=("sparse_attention", "attention", "select", "rope"),
    state_growth="linear",
    relations=(
        "dsa() == mla()",
        "dsa(num_heads=4, q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=12, qk_rope_head_dim=8, index_heads=2) =="
        " mla(num_heads=4, q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=12, qk_rope_head_dim=8)",
        "dsa(rope=False, qk_rope_head_dim=0, top_k=8) == dsa(qk_rope_head_dim=0, top_k=8)",
    ),
    examples=(
        {"num_heads": 4, "top_k": 12, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 12,
         "qk_rope_head_dim": 8, "index_heads": 3, "index_head_dim": 10},
        {"num_heads": 2, "top_k": 48, "rope": False, "kv_lora_rank": 8},
        {},
    ),
)  # fmt: skip
class DeepSeekSparseAttention(MultiHeadLatentAttention):
    """Multi-head latent attention in which each token reads the top_k tokens that its indexer scores highest.

    I_ts = sum_h w_th relu(qI_th . kI_s), qI from the query latent (from x without q_lora_rank), kI = LayerNorm(W x),
    index_heads heads of index_head_dim channels (defaults: half the heads, as wide as a head). Scores are computed
    for every visible token, attention in the absorbed form for the chosen ones; equal scores go to the earlier token.
    In training KL(heads' mean attention || softmax(I)) over the chosen tokens, times index_coef, is added to the loss.
    The indexer's inputs and the target are detached. Dense warm-up of the paper: the same block with top_k >= T, all
    but `indexer` frozen. The loss is not in the cost.
    x: [B, T, D] -> y: [B, T, D]. T^2 work for the indexer, T top_k for attention. State: that of MLA and one indexer
    key a token. A sequence of at most top_k tokens is MLA, in either of its forms.
    Parameters and layouts are those of DeepSeek-V3.2 in Hugging Face.
    Useful: a score of the indexer for each causal pair, and MLA's work for the chosen min(t, top_k) keys of token
    t.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: PositiveInt | None = None,
        top_k: PositiveInt = 2048,
        index_heads: PositiveInt | None = None,
        index_head_dim: PositiveInt | None = None,
        index_coef: NonNegativeFloat = 1.0,
        q_lora_rank: PositiveInt | None = None,
        kv_lora_rank: PositiveInt | None = None,
        qk_nope_head_dim: PositiveInt | None = None,
        qk_rope_head_dim: NonNegativeInt | None = None,
        v_head_dim: PositiveInt | None = None,
        rope: bool = True,
        rope_base: PositiveFloat = 10000.0,
        rope_interleaved: bool = True,
        rope_scaling: dict[str, Any] | None = None,
        norm_eps: PositiveFloat = 1e-6,
        bias: bool = False,
        kernel: str = "auto",
        device=None,
        dtype=None,
    ):
        super().__init__(
            dim, num_heads=num_heads, q_lora_rank=q_lora_rank, kv_lora_rank=kv_lora_rank,
            qk_nope_head_dim=qk_nope_head_dim, qk_rope_head_dim=qk_rope_head_dim, v_head_dim=v_head_dim, rope=rope,
            rope_base=rope_base, rope_interleaved=rope_interleaved, rope_scaling=rope_scaling, norm_eps=norm_eps,
            bias=bias, device=device, dtype=dtype,
        )  # fmt: skip
        check_backend("sparse_attention", kernel)
        self.sparse_kernel = kernel
        self.top_k, self.index_coef = top_k, index_coef
        rotary_dim = self.rope_dim if rope else 0
        width = index_head_dim or max(self.nope, self.rope_dim)
        if width < rotary_dim:
            raise ValueError(f"index_head_dim={width} must hold the qk_rope_head_dim={rotary_dim} rotated channels")
        self.indexer = LightningIndexer(
            dim, q_lora_rank or dim, index_heads or max(self.num_heads // 2, 1), width, rotary_dim, self.rope_options,
            device=device, dtype=dtype,
        )  # fmt: skip
        self.metrics: dict[str, Tensor] = {}

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.indexer.reset_parameters()

    def init_state(self, batch_size: int, max_len: int | None = None) -> KVCache:
        """The latents of MLA as keys, those of the indexer as values."""
        width, like = self.kv_lora_rank + self.rope_dim, self.reference_parameter.detach()
        return KVCache.create(batch_size, max_len, 1, width, self.indexer.head_dim, like=like)

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
        q_index = torch.arange(T, device=x.device).expand(B, T) if state is None else segment_index(state.length, T)
        if positions is None:
            positions = q_index if doc_ids is None else positions_from(doc_ids, B, T, x.device)
        query_input = self.query_input(x)
        q, cached = self.project(x, query_input, positions)
        context = 0 if state is None else state.size
        choose = context + T > self.top_k
        learn = self.training and torch.is_grad_enabled() and self.index_coef > 0
        index_k, k_index = cached[..., :0], q_index
        if state is not None or choose or learn:
            index_k = self.indexer.keys(x.detach(), positions)
        if state is not None:
            cached, index_k, k_index, _ = state.append(cached, index_k)
        index = None
        if choose or learn:
            index = (*self.indexer.queries(x.detach(), query_input.detach(), positions), index_k[:, :, 0])
        listed = None if index is None else self._choose(*index, q_index, k_index, doc_ids)
        absorbed = None
        if choose and listed is not None:
            absorbed = self.absorb(q)
            o, _ = sparse_attention(
                absorbed, cached, cached, BlockList(listed[:, None]), scale=self.scale, q_index=q_index,
                k_index=k_index, q_doc_ids=doc_ids, k_doc_ids=doc_ids, backend=self.sparse_kernel,
            )  # fmt: skip
            o = self.expand(o)
        else:
            order = {"q_index": q_index, "k_index": k_index} if context else {"q_index": None, "k_index": None}
            attend = self.attend_absorbed if self._absorbs(T, context) else self.attend_expanded
            o = attend(q, cached, doc_ids=doc_ids, **order)
        y = self.o_proj(o.flatten(2))
        if not learn or index is None or listed is None:
            return y
        if absorbed is None:
            with torch.no_grad():
                absorbed = self.absorb(q)
        loss = self._distillation_loss(absorbed.detach(), cached.detach()[:, :, 0], *index, listed)
        if recording(self):
            self.metrics = {"index_kl": loss.detach()}
        return add_auxiliary_loss(y, self.index_coef * loss)

    @torch.no_grad()
    def _choose(
        self, index_q: Tensor, w: Tensor, index_k: Tensor, q_index: Tensor, k_index: Tensor, doc_ids: Tensor | None
    ) -> Tensor:
        """Slots of the keys each token reads, int32 [B, T, min(top_k, S)], -1 at the end where there are fewer."""
        (B, T), lists = q_index.shape, []
        for part in pieces.cut(T, B * index_k.shape[1] * self.indexer.num_heads, ELEMENTS_AT_ONCE):
            visible = (k_index >= 0)[:, None] & (k_index[:, None] <= q_index[:, part, None])
            if doc_ids is not None:
                visible = visible & (doc_ids[:, None] == doc_ids[:, part, None])
            scores = self.indexer.scores(index_q[:, part], w[:, part], index_k)
            lists.append(select(scores[:, None], self.top_k, visible=visible[:, None]).idx[:, 0])
        return torch.cat(lists, 1)

    def _distillation_loss(
        self, q: Tensor, cached: Tensor, index_q: Tensor, w: Tensor, index_k: Tensor, listed: Tensor
    ) -> Tensor:
        """Mean over tokens of KL(absorbed heads' mean attention || softmax of the scores) over the `listed` keys; in
        parts that backward computes again, so that what is kept does not grow with top_k."""
        B, T, n = listed.shape
        width = self.num_heads + self.indexer.num_heads + q.shape[-1] + self.indexer.head_dim
        total = w.new_zeros((), dtype=state_dtype(w.dtype))
        for part in pieces.cut(T, B * n * width, ELEMENTS_AT_ONCE):
            given = (q[:, part], cached, index_q[:, part], w[:, part], index_k, listed[:, part])
            total = total + checkpoint(self._divergence, *given, use_reentrant=False)
        return total / (B * T)

    def _divergence(
        self, q: Tensor, cached: Tensor, index_q: Tensor, w: Tensor, index_k: Tensor, listed: Tensor
    ) -> Tensor:
        empty = listed < 0
        row = torch.arange(listed.shape[0], device=listed.device)[:, None, None]
        slot = listed.clamp(min=0).long()
        with torch.no_grad(), no_autocast(q.device):
            wide = state_dtype(q.dtype)
            logits = q.to(wide) @ cached[row, slot].to(wide).mT * self.scale  # [B, T, H, n]
            target = logits.masked_fill(empty[:, :, None], float("-inf")).softmax(-1).mean(2)
        scores = self.indexer.scores(index_q, w, index_k[row, slot])
        log_share = scores.masked_fill(empty, float("-inf")).log_softmax(-1).masked_fill(empty, 0)
        return F.kl_div(log_share, target, reduction="sum")

    def forward_flops(self, batch_size: int, seq_len: int, context_len: int = 0, streaming: bool = False) -> int:
        B, T, H, keys = batch_size, seq_len, self.num_heads, context_len + seq_len
        choose = keys > self.top_k
        index = self.indexer.flops(B * T, keys, select=choose) if choose or streaming else 0
        if not choose:
            return index + super().forward_flops(B, T, context_len, streaming)
        width = self.kv_lora_rank + self.rope_dim
        linears = [m for m in self.children() if isinstance(m, nn.Linear) and m is not self.kv_b_proj]
        absorb = 2 * B * T * H * self.kv_lora_rank * (self.nope + self.v_head_dim)
        attend = attending.flops(B, T, keys, H, 1, width, width, self.top_k, 1, 1)
        return index + linear_flops(B * T, *linears) + absorb + attend

    def useful_flops(self, batch_size: int, seq_len: int, context_len: int = 0) -> int:
        useful = super().useful_flops(batch_size, seq_len, context_len)
        if context_len + seq_len > self.top_k:
            pairs = work.pairs(seq_len, context_len)
            useful += self.indexer.useful_flops(batch_size * seq_len, batch_size * pairs)
        return useful

    def vector_flops(self, batch_size: int, seq_len: int, context_len: int = 0) -> int:
        total = super().vector_flops(batch_size, seq_len, context_len)
        if context_len + seq_len > self.top_k:
            pairs = work.pairs(seq_len, context_len)
            total += self.indexer.vector_flops(batch_size * seq_len, batch_size * pairs)
        return total

    @property
    def expectation(self) -> str:
        return (
            f"dsa: a token reads {self.top_k} keys, no two tokens of a call the same; the indexer's loss is not counted"
        )

    def unread_bytes(self, batch_size: int, seq_len: int, context_len: int) -> int:
        token = (self.kv_lora_rank + self.rope_dim) * self.itemsize
        return batch_size * work.unread_keys(seq_len, context_len, self.top_k) * token

    def _seen(self, seq_len: int, context_len: int) -> int:
        return work.pairs(seq_len, context_len, self.top_k)

    def state_bytes(self, batch_size: int, max_len: int) -> int:
        width = self.kv_lora_rank + self.rope_dim
        return kv_cache_bytes(batch_size, max_len, 1, width, self.indexer.head_dim, self.itemsize)

    def activation_elements(self, batch_size: int, seq_len: int) -> int:
        kept = super().activation_elements(batch_size, seq_len)
        if self.index_coef:
            # the indexer's keys before and after norm and rotation, its queries and weights, cos and sin for both; the
            # lists
            index = self.indexer
            token = 2 * index.head_dim + 2 + index.num_heads * (index.head_dim + 1)
            token += (2 * self.rope_dim if self.rope else 0) + min(self.top_k, seq_len)
            kept += batch_size * seq_len * token
        return kept

    def product_elements(self, batch_size: int, seq_len: int) -> int:
        tokens, H, R, index = batch_size * seq_len, self.num_heads, self.kv_lora_rank, self.indexer
        width, listed = R + self.rope_dim, min(self.top_k, seq_len)
        token = 0
        if seq_len > self.top_k:
            # outputs over latents, in the place of keys and values written out; queries are absorbed, outputs expanded
            token += H * (width - self.nope - self.v_head_dim)
            token += H * R * work.is_kept(tokens, self.nope, R)
            token -= H * self.v_head_dim * (not work.is_kept(tokens, R, self.v_head_dim))
        elif self.index_coef:
            token += H * R * work.is_kept(tokens, self.nope, R)
        if self.index_coef:  # the scores of both in the loss
            token += H * listed * work.is_kept(H, width, listed)
            token += index.num_heads * listed * work.is_kept(index.num_heads, index.head_dim, listed)
        return super().product_elements(batch_size, seq_len) + tokens * token

    def _attention_elements(self, seq_len: int) -> int:
        absorbed = self.num_heads * (self.kv_lora_rank + self.rope_dim)
        if seq_len <= self.top_k:  # absorbed queries are what the indexer learns from
            return super()._attention_elements(seq_len) + (absorbed if self.index_coef else 0)
        # q; absorbed, and their outputs with denominators; expanded outputs
        return self.num_heads * (self.qk_head_dim + self.v_head_dim + 1) + 2 * absorbed

    def parallel_plan(self) -> ParallelPlan:
        return ParallelPlan(context="gather_input", reason="the indexer learns from the attention of all heads")
