"""Softmax attention: multi-head, multi-query or grouped; rotary; optional window, sinks, norms and gates.

o_i = sum_{j <= i} softmax_j(s q_i . k_j) v_j,   q, k rotated by their positions,   y = W_o [o_1 .. o_H]

Vaswani et al. 2017 (1706.03762); grouped heads 2305.13245; window 2004.05150; sinks 2309.17453; q-k norm
2302.05442; gated output 2505.06708.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from zoo.blocks.cache_policy import CachePolicy
from zoo.blocks.heads import grouped_heads
from zoo.blocks.kv_cache import KVCache, RingKVCache, kv_cache_bytes, ring_slots, segment_index
from zoo.blocks.norms import RMSNorm
from zoo.blocks.selection import Policy, SelectState
from zoo.contract import (
    Block,
    ParallelPlan,
    SharedKeys,
    init_linear_,
    linear_flops,
    positions_from,
    refuse_packed_streaming,
)
from zoo.kernels import work
from zoo.kernels.attention import QUERY_TILE, attention, attention_flops, two_copies_kept
from zoo.kernels.dispatch import check_backend
from zoo.kernels.linear import Linear
from zoo.kernels.rope import check_scaling, rope
from zoo.registry import component, register
from zoo.schema import NonNegativeInt, PositiveFloat, PositiveInt


@register(
    "attention",
    kind="mixer",
    paper="arXiv:1706.03762",
    ops=("attention", "rope"),
    state_growth="linear",
    relations=(
        "attention(window=4096) == attention()",
        "attention(num_heads=4, num_kv_heads=4) == attention(num_heads=4)",
        "attention(num_heads=4, rotary_dim=16) == attention(num_heads=4)",
        "attention(rotary_dim=0) == attention(rope=False)",
        "attention(softcap=1000000.0) == attention()",
        "attention(num_heads=4, sink_logits=True) == attention(num_heads=4) at sinks=-inf",
    ),
    examples=(
        {},
        {"num_heads": 4, "num_kv_heads": 2, "bias": True},
        {"num_heads": 4, "window": 20},
        {"num_heads": 4, "num_kv_heads": 1, "window": 7, "sinks": 3},
        {"num_heads": 4, "qk_norm": "head", "output_gate": True, "rotary_dim": 8},
        {"num_heads": 4, "head_dim": 8, "qk_norm": "full", "norm_zero_centered": True, "rope_interleaved": True},
        {"num_heads": 4, "num_kv_heads": 2, "softcap": 5.0, "sink_logits": True, "window": 16},
        {"num_heads": 4, "rope": False, "scale": 0.3},
        {"num_heads": 4, "bias": "qk", "rotary_dim": 4, "rope_scaling": {"rope_type": "longrope", "factors": [1, 4]}},
    ),
)
class Attention(Block):
    """Softmax attention with grouped heads, rotary positions, window, sinks, q-k norm and output gate.

    o_i = sum_j softmax_j(s q_i . k_j) v_j over the tokens j <= i of the document, y = W_o o; H = num_heads
    query heads of d = head_dim read G = num_kv_heads key heads. x: [B, T, D] -> y: [B, T, D].
    `window`: only i - j < window, and always the first `sinks` tokens; `sink_logits`: a learnt score per
    head that takes weight and gives no value (GPT-OSS); `softcap` c: scores c tanh(s / c) (Gemma 2);
    `qk_norm`: RMS norm of each head (Qwen3) or of all channels (OLMo 2) of q and k, with factors 1 + w where
    `norm_zero_centered` (Gemma 3); `output_gate`:
    o * sigmoid(W_g x), rows of W_g beside those of q head by head (Qwen3-Next); `bias` of all four maps or of q and
    k alone (`qk`, Huginn), `out_bias` of W_o where it differs; `causal=False` sees the whole
    document and cannot be streamed. Rotary options: `rotary_dim` channels of each head, `rope_interleaved`
    pairs (2i, 2i+1), `rope_scaling` as in Hugging Face (rope_type linear, llama3, yarn; longrope of one length).
    `select`: a policy that says which keys a query reads, by its name or as {name: options}; `zoo list --kind select`
    names them, and `kernel` is then one of sparse_attention. `cache`: a policy that says what is kept, and how.
    State: keys and values, 2 G d a token, or of sinks + window tokens. 4 H d T^2 FLOPs a sequence (causal half
    of it useful), 4 H d T window with a window. A window of at least T is plain attention.
    Parameters and their layouts are those of Llama, Qwen3, OLMo 2, Gemma 2, GPT-OSS and Qwen3-Next in Hugging
    Face.
    Useful: 4 H d FLOPs for each pair of a query and a key that it sees, and five operations a score.
    """

    shares_keys = True

    def __init__(
        self,
        dim: int,
        *,
        num_heads: PositiveInt | None = None,
        num_kv_heads: PositiveInt | None = None,
        head_dim: PositiveInt | None = None,
        rope: bool = True,
        rope_base: PositiveFloat = 10000.0,
        rotary_dim: NonNegativeInt | None = None,
        rope_interleaved: bool = False,
        rope_scaling: dict[str, Any] | None = None,
        qk_norm: Literal["none", "head", "full"] = "none",
        norm_eps: PositiveFloat = 1e-6,
        norm_zero_centered: bool = False,
        bias: bool | Literal["qk"] = False,
        out_bias: bool | None = None,
        window: PositiveInt | None = None,
        sinks: NonNegativeInt = 0,
        sink_logits: bool = False,
        softcap: PositiveFloat | None = None,
        scale: PositiveFloat | None = None,
        output_gate: bool = False,
        causal: bool = True,
        select: str | dict[str, Any] | None = None,
        cache: str | dict[str, Any] | None = None,
        kernel: str = "auto",
        device=None,
        dtype=None,
    ):
        super().__init__(dim)
        check_backend("attention" if select is None else "sparse_attention", kernel)
        self.num_heads, self.num_kv_heads, self.head_dim = grouped_heads(dim, num_heads, num_kv_heads, head_dim)
        self.rotary_dim = (self.head_dim if rotary_dim is None else rotary_dim) if rope else 0
        if self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
            raise ValueError(
                f"rotary_dim={self.rotary_dim} must be even and at most head_dim={self.head_dim}; give another "
                "rotary_dim or head_dim, or rope: false"
            )
        check_scaling(rope_scaling, self.rotary_dim)
        if sinks and window is None:
            raise ValueError(f"sinks={sinks} keeps tokens that a window drops: give a window, or sinks=0")
        self.select: Policy | None = None
        self.cache: CachePolicy | None = None
        if select is not None or cache is not None:
            given = {"window": window, "softcap": softcap, "sink_logits": sink_logits, "causal=False": not causal}
            given |= {"select": select is not None and cache is not None}
            if wrong := [name for name, value in given.items() if value]:
                which = "cache" if select is None or wrong == ["select"] else "select"
                raise ValueError(f"{which} chooses keys for causal softmax attention; it does not go with {wrong[0]}")
            self.select = None if select is None else component("select", select)
            self.cache = None if cache is None else component("cache", cache)
            for policy in (self.select, self.cache):
                if policy is not None:
                    policy.bind(self.num_heads, self.num_kv_heads, self.head_dim, scale or self.head_dim**-0.5)
        self.rope_options = {"base": rope_base, "interleaved": rope_interleaved, "scaling": rope_scaling}
        self.window, self.num_sinks, self.softcap, self.scale = window, sinks, softcap, scale
        self.output_gate, self.causal, self.kernel, self.qk_norm = output_gate, causal, kernel, qk_norm
        q_width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        factory = {"device": device, "dtype": dtype}
        self.q_proj = Linear(dim, q_width * (2 if output_gate else 1), bias=bool(bias), **factory)
        self.k_proj = Linear(dim, kv_width, bias=bool(bias), **factory)
        self.v_proj = Linear(dim, kv_width, bias=bias is True, **factory)
        self.o_proj = Linear(q_width, dim, bias=bias is True if out_bias is None else out_bias, **factory)
        self.q_norm = self.k_norm = None
        if qk_norm != "none":
            widths = (self.head_dim, self.head_dim) if qk_norm == "head" else (q_width, kv_width)
            norm = {"eps": norm_eps, "zero_centered": norm_zero_centered}
            self.q_norm, self.k_norm = (RMSNorm(w, **norm, **factory) for w in widths)
        self.sinks = nn.Parameter(torch.empty(self.num_heads, **factory)) if sink_logits else None

    def reset_parameters(self) -> None:
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            init_linear_(linear)
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                norm.reset_parameters()
        if self.sinks is not None:
            nn.init.zeros_(self.sinks)

    def init_state(self, batch_size: int, max_len: int | None = None) -> Any:
        shape, like = (batch_size, max_len, self.num_kv_heads, self.head_dim), self.reference_parameter.detach()
        if self.cache is not None:
            return self.cache.init_state(batch_size, max_len, like)
        if self.window is None:
            cache = KVCache.create(*shape, like=like)
            return cache if self.select is None else self.select.init_state(cache)
        return RingKVCache.create(*shape, window=self.window, sinks=self.num_sinks, like=like)

    def forward(
        self,
        x: Tensor,
        *,
        state: Any = None,
        positions: Tensor | None = None,
        doc_ids: Tensor | None = None,
    ) -> Tensor:
        if self.select is not None or self.cache is not None:
            return self._governed(x, state, positions, doc_ids)
        keys = state if isinstance(state, SharedKeys) else SharedKeys(state)
        if positions is None and self.rotary_dim:
            positions = self._positions(x, keys, doc_ids)
        if not keys.written:
            self.write_keys(x, keys, positions=positions, doc_ids=doc_ids)
        q, gate = self._queries(x, positions)
        o, _ = attention(
            q, keys.k, keys.v, causal=self.causal, window=self.window, sinks=self.num_sinks, scale=self.scale,
            softcap=self.softcap, q_index=keys.q_index, k_index=keys.k_index, q_doc_ids=doc_ids,
            k_doc_ids=keys.doc_ids, sink_logits=self.sinks, backend=self.kernel,
        )  # fmt: skip
        return self._output(o, gate)

    def _governed(self, x: Tensor, state: Any, positions: Tensor | None, doc_ids: Tensor | None) -> Tensor:
        """Attention to what a policy chooses."""
        refuse_packed_streaming(state, doc_ids)
        if isinstance(state, SharedKeys):
            raise ValueError("keys that several calls share are read whole: leave the policy out")
        q, k, v, gate = self._project(x)
        cache: Any = state.cache if isinstance(state, SelectState) else state
        if positions is None:
            positions = self._positions(x, SharedKeys(cache), doc_ids)
        if self.cache is not None:
            given = {"doc_ids": doc_ids, "state": state, "backend": self.kernel}
            return self._output(self.cache(q, k, v, positions, rotate=self._rotate, **given), gate)
        q, k, k_index = self._rotate(q, positions), self._rotate(k, positions), None
        if cache is not None:
            k, v, k_index, _ = cache.append(k, v)
        select: Any = self.select
        o = select(q, k, v, k_index=k_index, doc_ids=doc_ids, state=state, backend=self.kernel)
        return self._output(o, gate)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Queries, keys, values and gate, not rotated."""
        q, gate = self._queries(x, None)
        return q, self._normed(self.k_proj(x), self.k_norm), self.v_proj(x).unflatten(-1, (-1, self.head_dim)), gate

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        return rope(x, positions, rotary_dim=self.rotary_dim, **self.rope_options) if self.rotary_dim else x

    def _output(self, o: Tensor, gate: Tensor | None) -> Tensor:
        o = o.flatten(2)
        return self.o_proj(o if gate is None else o * torch.sigmoid(gate))

    @property
    def cuts_gradient(self) -> str:
        return "" if self.cache is None else self.cache.cuts_gradient

    @property
    def sees_blocks(self) -> bool:
        # a subclass has a mask of its own
        return type(self) is Attention and self.window is None and self.select is None and self.cache is None

    @property
    def expectation(self) -> str:
        policy = self.select or self.cache
        return "" if policy is None else policy.expectation

    def write_keys(
        self, x: Tensor, keys: SharedKeys, *, positions: Tensor | None = None, doc_ids: Tensor | None = None
    ) -> None:
        """Fill `keys` with those of x [B, T, D], and of the tokens before it where `keys.own` is a state."""
        own: Any = keys.own
        refuse_packed_streaming(own, doc_ids)
        if own is not None and not self.causal:
            raise ValueError("causal=False sees the whole document, so it cannot be streamed: call it without a state")
        # -1 heads: under tensor parallelism a rank holds only some
        k, v = self.k_proj(x), self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        k = self._normed(k, self.k_norm)
        if self.rotary_dim:
            positions = self._positions(x, keys, doc_ids) if positions is None else positions
            k = rope(k, positions, rotary_dim=self.rotary_dim, **self.rope_options)
        q_index = k_index = None
        if own is not None:
            plain = own.in_order
            k, v, k_index, q_index = own.append(k, v)
            if plain:
                q_index = k_index = None
        elif doc_ids is not None and self.num_sinks:
            # each document has its own sinks
            q_index = k_index = positions_from(doc_ids, x.shape[0], x.shape[1], x.device)
        keys.k, keys.v, keys.q_index, keys.k_index, keys.doc_ids = k, v, q_index, k_index, doc_ids

    def _positions(self, x: Tensor, keys: SharedKeys, doc_ids: Tensor | None) -> Tensor:
        own: Any = keys.own
        B, T = x.shape[:2]
        return positions_from(doc_ids, B, T, x.device) if own is None else segment_index(own.length, T)

    def _queries(self, x: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor | None]:
        q, gate = self.q_proj(x), None
        if self.output_gate:
            q, gate = (y.flatten(2) for y in q.unflatten(-1, (-1, 2, self.head_dim)).unbind(3))
        q = self._normed(q, self.q_norm)
        if self.rotary_dim and positions is not None:
            q = rope(q, positions, rotary_dim=self.rotary_dim, **self.rope_options)
        return q, gate

    def _normed(self, y: Tensor, norm: RMSNorm | None) -> Tensor:
        """y [B, T, H d] in heads, with the q-k norm of all its channels or of each head."""
        if norm is not None and self.qk_norm == "full":
            y = norm(y)
        y = y.unflatten(-1, (-1, self.head_dim))
        return norm(y) if norm is not None and self.qk_norm == "head" else y

    def forward_flops(self, batch_size: int, seq_len: int, context_len: int = 0, streaming: bool = False) -> int:
        keys, outer = context_len + seq_len, (self.q_proj, self.k_proj, self.v_proj, self.o_proj)
        if self.select is not None:
            chosen = self.select.flops(batch_size, seq_len, keys, streaming)
            return linear_flops(batch_size * seq_len, *outer) + chosen
        if self.cache is not None:
            held = self.cache.flops(batch_size, seq_len, context_len, streaming)
            return linear_flops(batch_size * seq_len, *outer) + held
        return self.key_flops(batch_size * seq_len) + self.query_flops(batch_size, seq_len, seq_len, context_len)

    def key_flops(self, tokens: int) -> int:
        """Executed matrix FLOPs of `write_keys`."""
        return linear_flops(tokens, self.k_proj, self.v_proj)

    def query_flops(self, batch_size: int, queries: int, seq_len: int, context_len: int = 0) -> int:
        """Executed matrix FLOPs of a forward of `queries` tokens that finds the keys of its segment written."""
        keys = context_len + seq_len
        if context_len and self.window is not None:
            slots = ring_slots(None, self.window, self.num_sinks)
            keys = min(keys, slots) if seq_len == 1 else min(context_len, slots) + seq_len
        return linear_flops(batch_size * queries, self.q_proj, self.o_proj) + attention_flops(
            batch_size, queries, keys, self.num_heads, self.head_dim, causal=self.causal, window=self.window,
            sinks=self.num_sinks, plain=not context_len and queries == seq_len, fused=self._fused,
        )  # fmt: skip

    def useful_flops(self, batch_size: int, seq_len: int, context_len: int = 0) -> int:
        return self.key_flops(batch_size * seq_len) + self.useful_query_flops(batch_size, seq_len, seq_len, context_len)

    def useful_query_flops(self, batch_size: int, queries: int, seq_len: int, context_len: int = 0) -> int:
        """What the mathematics needs of `query_flops`."""
        attend = 4 * self.head_dim * (self.scores(seq_len, context_len) * queries // seq_len)
        attend += 0 if self.select is None else self.select.choosing_flops(seq_len, context_len)
        return linear_flops(batch_size * queries, self.q_proj, self.o_proj) + batch_size * attend

    def scores(self, seq_len: int, context_len: int = 0) -> int:
        """Scores that the softmax of a row runs over, of all heads."""
        policy = self.select or self.cache
        if policy is not None:
            return policy.scores(seq_len, context_len)
        if not self.causal:
            return self.num_heads * seq_len * (context_len + seq_len)
        return self.num_heads * work.window_pairs(seq_len, context_len, self.window, self.num_sinks)

    def vector_flops(self, batch_size: int, seq_len: int, context_len: int = 0) -> int:
        q_width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        score = work.SOFTMAX + (0 if self.softcap is None else work.SOFTCAP)
        token = work.ROPE * self.rotary_dim * (self.num_heads + self.num_kv_heads)
        token += 0 if self.qk_norm == "none" else work.RMS * (q_width + kv_width)
        token += (work.SIGMOID + 1) * q_width if self.output_gate else 0
        token += 0 if self.sinks is None else score * self.num_heads  # one more score
        return batch_size * (seq_len * token + score * self.scores(seq_len, context_len))

    def unread_bytes(self, batch_size: int, seq_len: int, context_len: int) -> int:
        unread = 0 if self.select is None else self.select.unread_keys(seq_len, context_len)
        return batch_size * unread * 2 * self.num_kv_heads * self.head_dim * self.itemsize

    @property
    def _fused(self) -> bool:
        return self.softcap is None and self.sinks is None and self.kernel in ("auto", "sdpa")

    def state_bytes(self, batch_size: int, max_len: int) -> int:
        if self.cache is not None:
            return batch_size * self.cache.state_bytes(max_len, self.itemsize)
        slots = max_len if self.window is None else ring_slots(max_len, self.window, self.num_sinks)
        cache = kv_cache_bytes(batch_size, slots, self.num_kv_heads, self.head_dim, self.head_dim, self.itemsize)
        return cache + (0 if self.select is None else batch_size * self.select.state_bytes(max_len, self.itemsize))

    def activation_elements(self, batch_size: int, seq_len: int) -> int:
        q_width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        tokens = batch_size * seq_len
        kept = tokens * self.dim  # x
        if self.q_norm is not None and self.k_norm is not None:
            heads = (1, 1) if self.qk_norm == "full" else (self.num_heads, self.num_kv_heads)
            norms = zip((self.q_norm, self.k_norm), heads, strict=True)
            kept += sum(norm.activation_elements(tokens * rows) for norm, rows in norms)
        if self.output_gate:
            kept += 2 * tokens * q_width  # its sigmoid, the product
        if self.cache is not None:
            return kept + batch_size * self.cache.kept(seq_len, self.rotary_dim)
        # q and k as they are rotated, v, o with its denominators, cos and sin for q and for k
        kept += tokens * (2 * q_width + 2 * kv_width + self.num_heads + 2 * self.rotary_dim)
        if self.select is not None:
            return kept + batch_size * self.select.kept(seq_len)
        if self.kernel in ("chunked", "reference") and seq_len <= QUERY_TILE:  # longer ones recompute their scores
            kept += 4 * tokens * self.num_heads * seq_len
        return kept

    def key_elements(self, tokens: int) -> int:
        """Of `activation_elements` those that `write_keys` keeps."""
        norm = 0
        if self.k_norm is not None:
            norm = self.k_norm.activation_elements(tokens * (1 if self.qk_norm == "full" else self.num_kv_heads))
        return tokens * (2 * self.num_kv_heads * self.head_dim + self.rotary_dim) + norm

    def copies_elements(self, batch_size: int, seq_len: int, causal: bool) -> tuple[int, int]:
        tokens, width = batch_size * seq_len, self.head_dim
        return two_copies_kept(tokens, self.num_heads, width, causal), tokens * self.num_heads * (width + 1)

    def parallel_plan(self) -> ParallelPlan:
        if self.select is not None and self.select.by_head:
            return ParallelPlan(reason="select: this policy tells heads apart by their numbers")
        # a policy reads keys, scores or caches of the whole row
        context = "gather_kv" if self.select is None and self.cache is None else "gather_input"
        if self.qk_norm == "full":
            return ParallelPlan(context=context, reason="qk_norm: full normalises over the channels of all heads")
        tensor = {"q_proj": "column", "k_proj": "column", "v_proj": "column", "o_proj": "row"}
        tensor |= {"sinks": "column"} if self.sinks is not None else {}
        tensor |= {"q_norm": "replicate", "k_norm": "replicate"} if self.q_norm is not None else {}
        return ParallelPlan(tensor, units=self.num_kv_heads, context=context)
