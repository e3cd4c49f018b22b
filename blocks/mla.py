"""Multi-head latent attention: keys and values are expanded from one small latent per token.

c_j = RMSNorm(W_DKV x_j),  [k_j,h ; v_j,h] = W_UKV,h c_j,  kr_j = RoPE(W_KR x_j)  shared by all heads,
s_ij,h = ([qn_i,h ; RoPE(qr_i,h)] . [k_j,h ; kr_j]) / sqrt(nope + rope).

Cached are c_j and kr_j alone. Absorbed form for decoding: qn . (W_UK c) = (W_UK^T qn) . c, so that all heads
attend over the latents as over one key head. DeepSeek-V2 2024, arXiv:2405.04434.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zoo.blocks.heads import default_num_heads
from zoo.blocks.kv_cache import KVCache, kv_cache_bytes, segment_index
from zoo.blocks.norms import RMSNorm
from zoo.contract import Block, ParallelPlan, init_linear_, linear_flops, positions_from, refuse_packed_streaming
from zoo.kernels import work
from zoo.kernels.attention import attention, attention_flops, two_copies_kept
from zoo.kernels.dispatch import check_backend
from zoo.kernels.linear import Linear
from zoo.kernels.rope import check_scaling, rope, yarn_mscale
from zoo.kernels.slices import attention_keys
from zoo.registry import register
from zoo.row import Slice, current, whole
from zoo.schema import NonNegativeInt, PositiveFloat, PositiveInt


@register(
    "mla",
    kind="mixer",
    paper="arXiv:2405.04434",
    ops=("attention", "rope"),
    state_growth="linear",
    relations=(
        "mla(rope=False, qk_rope_head_dim=0) == mla(qk_rope_head_dim=0)",
        "mla(num_heads=2, rope=False, qk_rope_head_dim=0, kv_lora_rank=64, qk_nope_head_dim=32, "
        "v_head_dim=32) == attention(num_heads=2, rope=False) at kv_a_layernorm=identity, "
        "kv_a_proj_with_mqa.weight=eye, kv_b_proj.weight[:32]=k_proj.weight[:32], "
        "kv_b_proj.weight[32:64]=v_proj.weight[:32], kv_b_proj.weight[64:96]=k_proj.weight[32:], "
        "kv_b_proj.weight[96:]=v_proj.weight[32:]",
    ),
    examples=(
        {},
        {"num_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8},
        {"num_heads": 4, "rope": False, "v_head_dim": 8, "bias": True},
        {"num_heads": 2, "qk_rope_head_dim": 0, "kv_lora_rank": 8},
    ),
)
class MultiHeadLatentAttention(Block):
    """Attention whose cache is one low-rank latent and one shared rotary key per token (MLA).

    c = RMSNorm(W_DKV x), k_h = [W_UK,h c ; RoPE(W_KR x)], v_h = W_UV,h c, q_h = [qn_h ; RoPE(qr_h)] from x or,
    with `q_lora_rank`, from RMSNorm(W_DQ x); o = softmax(q k / sqrt(nope + rope)) v, y = W_o o.
    x: [B, T, D] -> y: [B, T, D]. `rope=False` leaves all channels without position (Kimi Linear).
    Defaults: heads of about 64 channels, kv_lora_rank = D / 4, rope channels half of the nope channels.
    State: kv_lora_rank + qk_rope_head_dim a token, whatever the number of heads. A segment after a context
    runs in the absorbed form (latents as one key head) or expands the cache, whichever costs less; both are
    the same function. With kv_lora_rank >= heads * (nope + v) and no norm it can be any multi-head attention.
    Parameters and layouts are those of DeepSeek-V3 in Hugging Face, rotary pairs (2i, 2i+1).
    Useful: 2 H (nope + rope + v) FLOPs a causal pair and one expansion a token, or the absorbed form, if that is
    less.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: PositiveInt | None = None,
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
        super().__init__(dim)
        check_backend("attention", kernel)
        H = self.num_heads = num_heads or default_num_heads(dim)
        self.q_lora_rank, self.kv_lora_rank = q_lora_rank, kv_lora_rank or max(dim // 4, 1)
        self.nope = qk_nope_head_dim or max(dim // H, 1)
        self.rope_dim = 2 * max(self.nope // 4, 1) if qk_rope_head_dim is None else qk_rope_head_dim
        self.v_head_dim = v_head_dim or self.nope
        if rope and self.rope_dim % 2:
            raise ValueError(f"qk_rope_head_dim={self.rope_dim} must be even; give an even one, or rope: false")
        check_scaling(rope_scaling, self.rope_dim)
        self.rope, self.kernel = rope, kernel
        self.rope_options = {"base": rope_base, "interleaved": rope_interleaved, "scaling": rope_scaling}
        self.qk_head_dim = self.nope + self.rope_dim
        self.scale = self.qk_head_dim**-0.5
        if rope_scaling and rope_scaling.get("mscale_all_dim"):
            self.scale *= yarn_mscale(float(rope_scaling["factor"]), float(rope_scaling["mscale_all_dim"])) ** 2
        factory = {"device": device, "dtype": dtype}
        if q_lora_rank is None:
            self.q_proj = Linear(dim, H * self.qk_head_dim, bias=False, **factory)
        else:
            self.q_a_proj = Linear(dim, q_lora_rank, bias=bias, **factory)
            self.q_a_layernorm = RMSNorm(q_lora_rank, eps=norm_eps, **factory)
            self.q_b_proj = Linear(q_lora_rank, H * self.qk_head_dim, bias=False, **factory)
        self.kv_a_proj_with_mqa = Linear(dim, self.kv_lora_rank + self.rope_dim, bias=bias, **factory)
        self.kv_a_layernorm = RMSNorm(self.kv_lora_rank, eps=norm_eps, **factory)
        self.kv_b_proj = Linear(self.kv_lora_rank, H * (self.nope + self.v_head_dim), bias=False, **factory)
        self.o_proj = Linear(H * self.v_head_dim, dim, bias=bias, **factory)

    def reset_parameters(self) -> None:
        for module in self.children():
            if isinstance(module, nn.Linear):
                init_linear_(module)
            elif isinstance(module, RMSNorm):
                module.reset_parameters()

    def init_state(self, batch_size: int, max_len: int | None = None) -> KVCache:
        width, like = self.kv_lora_rank + self.rope_dim, self.reference_parameter.detach()
        return KVCache.create(batch_size, max_len, 1, width, 0, like=like)

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
        if positions is None:
            in_row = state is not None
            positions = segment_index(state.length, T) if in_row else positions_from(doc_ids, B, T, x.device)
        q, cached = self.project(x, self.query_input(x), positions)
        context = 0
        q_index = k_index = None
        if state is not None:
            context, plain = state.size, state.in_order
            cached, _, k_index, q_index = state.append(cached, cached[..., :0])
            if plain:
                q_index = k_index = None
        if (part := current()) is not None:  # the latents are sent, which are less than keys and values
            o = self._attend_row(part, q, cached, doc_ids)
        else:
            attend = self.attend_absorbed if self._absorbs(T, context) else self.attend_expanded
            o = attend(q, cached, q_index=q_index, k_index=k_index, doc_ids=doc_ids)
        return self.o_proj(o.flatten(2))

    def _attend_row(self, part: Slice, q: Tensor, cached: Tensor, doc_ids: Tensor | None) -> Tensor:
        """Outputs [B, T, H, v] of a slice's queries over the latents of the slices up to it."""
        cached, _, q_index, k_index, k_doc_ids = attention_keys(
            part, q, cached, cached[..., :0], True, None, None, doc_ids
        )
        with whole():
            return self.attend_expanded(
                q, cached, q_index=q_index, k_index=k_index, doc_ids=doc_ids, k_doc_ids=k_doc_ids
            )

    @property
    def sees_blocks(self) -> bool:
        return type(self) is MultiHeadLatentAttention  # a subclass has a mask of its own

    def query_input(self, x: Tensor) -> Tensor:
        """What queries are projected from: the latent [B, T, q_lora_rank], or x itself."""
        return x if self.q_lora_rank is None else self.q_a_layernorm(self.q_a_proj(x))

    def project(self, x: Tensor, query_input: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Queries [B, T, H, nope + rope] and what is cached of each token [B, T, 1, kv_lora_rank + rope]."""
        q = (self.q_proj if self.q_lora_rank is None else self.q_b_proj)(query_input)
        q_nope, q_rope = q.unflatten(-1, (-1, self.qk_head_dim)).split([self.nope, self.rope_dim], -1)
        latent, k_rope = self.kv_a_proj_with_mqa(x)[:, :, None].split([self.kv_lora_rank, self.rope_dim], -1)
        if self.rope:
            q_rope, k_rope = (rope(y, positions, **self.rope_options) for y in (q_rope, k_rope))
        return torch.cat([q_nope, q_rope], -1), torch.cat([self.kv_a_layernorm(latent), k_rope], -1)

    def attend_expanded(
        self, q: Tensor, cached: Tensor, *, q_index: Tensor | None, k_index: Tensor | None, doc_ids: Tensor | None,
        k_doc_ids: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Outputs [B, T, H, v] with the keys and values of every cached token written out."""
        latent, k_rope = cached.split([self.kv_lora_rank, self.rope_dim], -1)
        k_nope, v = (
            self.kv_b_proj(latent.squeeze(2))
            .unflatten(-1, (-1, self.nope + self.v_head_dim))
            .split([self.nope, self.v_head_dim], -1)
        )
        k = torch.cat([k_nope, k_rope.expand(-1, -1, k_nope.shape[2], -1)], -1)
        return attention(
            q, k, v, scale=self.scale, q_index=q_index, k_index=k_index, q_doc_ids=doc_ids, k_doc_ids=k_doc_ids,
            backend=self.kernel,
        )[0]  # fmt: skip

    def attend_absorbed(
        self, q: Tensor, cached: Tensor, *, q_index: Tensor | None, k_index: Tensor | None, doc_ids: Tensor | None
    ) -> Tensor:
        """The same outputs from the latents themselves: W_UK joins the queries, W_UV the outputs."""
        # the rotary keys ride along as values, so that keys and values are one tensor of one width
        o, _ = attention(
            self.absorb(q), cached, cached, scale=self.scale, q_index=q_index, k_index=k_index, q_doc_ids=doc_ids,
            k_doc_ids=doc_ids, backend=self.kernel,
        )  # fmt: skip
        return self.expand(o)

    def absorb(self, q: Tensor) -> Tensor:
        """Queries [B, T, H, kv_lora_rank + rope] that score what is cached itself."""
        q_nope, q_rope = q.split([self.nope, self.rope_dim], -1)
        return torch.cat([torch.einsum("bthn,hnr->bthr", q_nope, self._up_weight[:, : self.nope]), q_rope], -1)

    def expand(self, o: Tensor) -> Tensor:
        """Outputs [B, T, H, v] of attention whose values are what is cached."""
        return torch.einsum("bthr,hvr->bthv", o[..., : self.kv_lora_rank], self._up_weight[:, self.nope :])

    @property
    def _up_weight(self) -> Tensor:
        """W_UK over W_UV of each head, [H, nope + v, kv_lora_rank]."""
        return self.kv_b_proj.weight.unflatten(0, (-1, self.nope + self.v_head_dim))

    def _attend_flops(self, seq_len: int, context_len: int, absorbed: bool) -> int:
        """Per row, everything between the projections of the new tokens and o_proj."""
        H, R, keys = self.num_heads, self.kv_lora_rank, context_len + seq_len
        width = (R + self.rope_dim, R + self.rope_dim) if absorbed else (self.qk_head_dim, self.v_head_dim)
        expand = 2 * (seq_len if absorbed else keys) * H * R * (self.nope + self.v_head_dim)
        fused = self.kernel in ("auto", "sdpa")
        return expand + attention_flops(1, seq_len, keys, H, *width, plain=not context_len, fused=fused)

    def _absorbs(self, seq_len: int, context_len: int) -> bool:
        # without a context expanding is the form to train with, and no token is expanded twice
        return context_len > 0 and self._attend_flops(seq_len, context_len, True) < self._attend_flops(
            seq_len, context_len, False
        )

    def forward_flops(self, batch_size: int, seq_len: int, context_len: int = 0, streaming: bool = False) -> int:
        linears = [m for m in self.children() if isinstance(m, nn.Linear) and m is not self.kv_b_proj]
        absorbed = self._absorbs(seq_len, context_len)
        return linear_flops(batch_size * seq_len, *linears) + batch_size * self._attend_flops(
            seq_len, context_len, absorbed
        )

    def useful_flops(self, batch_size: int, seq_len: int, context_len: int = 0) -> int:
        linears = [m for m in self.children() if isinstance(m, nn.Linear) and m is not self.kv_b_proj]
        attend = self._useful_attend(seq_len, context_len, self._seen(seq_len, context_len))
        return linear_flops(batch_size * seq_len, *linears) + batch_size * attend

    def _useful_attend(self, seq_len: int, context_len: int, pairs: int) -> int:
        """Of a row whose queries see `pairs` keys: in the form, expanded or absorbed, that takes less."""
        H, R, keys = self.num_heads, self.kv_lora_rank, context_len + seq_len
        up = 2 * H * R * (self.nope + self.v_head_dim)
        expanded = keys * up + work.attention_work(H, pairs, self.qk_head_dim, self.v_head_dim)
        return min(expanded, seq_len * up + work.attention_work(H, pairs, R + self.rope_dim, R))

    def vector_flops(self, batch_size: int, seq_len: int, context_len: int = 0) -> int:
        norms = work.RMS * (self.kv_lora_rank + (self.q_lora_rank or 0))
        turned = work.ROPE * self.rope_dim * (self.num_heads + 1) if self.rope else 0
        scores = self.num_heads * self._seen(seq_len, context_len)
        return batch_size * (seq_len * (norms + turned) + work.SOFTMAX * scores)

    def _seen(self, seq_len: int, context_len: int) -> int:
        """Keys that the queries of a row read."""
        return work.pairs(seq_len, context_len)

    def state_bytes(self, batch_size: int, max_len: int) -> int:
        return kv_cache_bytes(batch_size, max_len, 1, self.kv_lora_rank + self.rope_dim, 0, self.itemsize)

    def activation_elements(self, batch_size: int, seq_len: int) -> int:
        # x; the latent with its rotary key, before and after norm; cos and sin for q and for k; the queries' latent
        latent = self.kv_lora_rank + self.rope_dim
        token = self.dim + 2 * latent + self.kv_lora_rank + 1 + (2 * self.rope_dim if self.rope else 0)
        token += 0 if self.q_lora_rank is None else 3 * self.q_lora_rank + 1
        return batch_size * seq_len * (token + self._attention_elements(seq_len))

    def _attention_elements(self, seq_len: int) -> int:
        """Elements of a token kept for attention: q, k, v, o and its denominators."""
        return self.num_heads * (2 * self.qk_head_dim + 2 * self.v_head_dim + 1)

    def copies_elements(self, batch_size: int, seq_len: int, causal: bool) -> tuple[int, int]:
        tokens, width = batch_size * seq_len, self.v_head_dim
        return two_copies_kept(tokens, self.num_heads, width, causal), tokens * self.num_heads * (width + 1)

    def parallel_plan(self) -> ParallelPlan:
        whole = ("kv_a_proj_with_mqa", "kv_a_layernorm", "q_a_proj", "q_a_layernorm")
        tensor = {name: "replicate" for name in whole if hasattr(self, name)}
        tensor |= {"kv_b_proj": "column", "o_proj": "row"}
        tensor["q_proj" if self.q_lora_rank is None else "q_b_proj"] = "column"
        return ParallelPlan(tensor, units=self.num_heads, context="gather_kv")
