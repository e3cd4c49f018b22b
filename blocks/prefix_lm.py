"""Prefix language modelling: attention whose first tokens see one another both ways. Raffel et al. 2019,
arXiv:1910.10683; Liu et al. 2018, arXiv:1801.10198.

    o_t = softmax_j(s q_t . k_j) v_j   over j <= max(t, prefix_len - 1)
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from zoo.blocks.attention import Attention
from zoo.blocks.kv_cache import segment_index
from zoo.contract import linear_flops, positions_from, refuse_packed_streaming
from zoo.kernels import work
from zoo.kernels.attention import attention, attention_flops
from zoo.registry import register
from zoo.schema import NonNegativeInt, PositiveFloat, PositiveInt


@register(
    "prefix_lm",
    kind="mixer",
    paper="arXiv:1910.10683",
    ops=("attention", "rope"),
    causal=False,
    state_growth="linear",
    relations=(
        "prefix_lm(prefix_len=0) == attention()",
        "prefix_lm(prefix_len=4096) == attention(causal=False)",
    ),
    examples=(
        {"num_heads": 4, "num_kv_heads": 2, "prefix_len": 12},
        {"num_heads": 2, "prefix_len": 100, "qk_norm": "head", "rope": False},
    ),
    note="the tokens of the prefix see the whole prefix, so it must arrive in one segment and stay out of the loss",
)
class PrefixAttention(Attention):
    """Attention with the mask of a prefix language model: both ways among the first prefix_len tokens, then causal.

    Token t of a document sees the tokens j <= max(t, prefix_len - 1); a shorter document is all prefix.
    x: [B, T, D] -> y: [B, T, D]; 4 H d T^2 FLOPs. State: the key-value cache of `attention`. Streaming: the prefix is
    what the first segment of a row holds of its first prefix_len tokens; segments after it may be cut anywhere.
    prefix_len = 0 is attention, a prefix of T attention without a causal mask. Parameters are those of `attention`.
    Useful: 4 H d FLOPs a causal pair, and for the pairs that look ahead in the prefix.
    """

    shares_keys = False

    def __init__(
        self,
        dim: int,
        *,
        prefix_len: NonNegativeInt = 256,
        num_heads: PositiveInt | None = None,
        num_kv_heads: PositiveInt | None = None,
        head_dim: PositiveInt | None = None,
        rope: bool = True,
        rope_base: PositiveFloat = 10000.0,
        qk_norm: Literal["none", "head", "full"] = "none",
        kernel: str = "auto",
        device=None,
        dtype=None,
    ):
        super().__init__(
            dim, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, rope=rope, rope_base=rope_base,
            qk_norm=qk_norm, kernel=kernel, device=device, dtype=dtype,
        )  # fmt: skip
        self.prefix_len, self.causal = prefix_len, prefix_len == 0

    def forward(
        self, x: Tensor, *, state: Any = None, positions: Tensor | None = None, doc_ids: Tensor | None = None
    ) -> Tensor:
        refuse_packed_streaming(state, doc_ids)
        B, T, _ = x.shape
        q, k, v, gate = self._project(x)
        place = positions_from(doc_ids, B, T, x.device) if state is None else segment_index(state.length, T)
        q, k = (self._rotate(h, place if positions is None else positions) for h in (q, k))
        k_index = place
        if state is not None:
            k, v, k_index, _ = state.append(k, v)
        last = place.clamp(min=self.prefix_len - 1)  # that a token sees
        o, _ = attention(
            q, k, v, q_index=last, k_index=k_index, q_doc_ids=doc_ids, k_doc_ids=doc_ids, backend=self.kernel
        )  # fmt: skip
        return self._output(o, gate)

    def forward_flops(self, batch_size: int, seq_len: int, context_len: int = 0, streaming: bool = False) -> int:
        sizes = (batch_size, seq_len, context_len + seq_len, self.num_heads, self.head_dim)
        linear = linear_flops(batch_size * seq_len, self.q_proj, self.k_proj, self.v_proj, self.o_proj)
        return linear + attention_flops(*sizes, plain=False, fused=self._fused)

    def scores(self, seq_len: int, context_len: int = 0) -> int:
        prefix = 0 if context_len else min(self.prefix_len, seq_len)  # its tokens see those behind them, too
        return self.num_heads * (work.pairs(seq_len, context_len) + prefix * (prefix - 1) // 2)
