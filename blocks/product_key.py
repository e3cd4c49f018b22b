"""Product-key memory: a large table read sparsely by content (arXiv:1907.05242).

q = norm(W_q x) = [q1; q2] per head; slot (i, j) of n^2 scores q1 . c_i + q2 . c'_j; w = softmax over the top-k;
m = sum over heads and chosen slots of w V; y = W_o m, times a gate sigmoid(w_g x + b) where wanted (Hydra).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from zoo.blocks.measure import recording
from zoo.blocks.norms import RMSNorm
from zoo.contract import Block, Cost, Mode, ParallelPlan, State, init_linear_, linear_flops
from zoo.kernels import work
from zoo.kernels.dispatch import check_backend
from zoo.kernels.linear import Linear
from zoo.kernels.product_key_lookup import product_key_lookup
from zoo.kernels.product_key_lookup.cost import flops as lookup_flops
from zoo.registry import register
from zoo.schema import PositiveInt


@register(
    "product_key",
    kind="memory",
    paper="arXiv:1907.05242",
    ops=("product_key_lookup",),
    examples=(
        {"num_keys": 8, "key_dim": 8, "top_k": 4, "num_heads": 2},
        {"num_keys": 8, "key_dim": 16, "top_k": 8, "value_dim": 32, "gated": True, "query_norm": "none"},
    ),
)
class ProductKeyMemory(Block):
    """Product-key memory: y = beta W_o sum_{heads, top-k slots} softmax(q1 . c_i + q2 . c'_j) V_ij.

    num_keys = n half keys of width key_dim per head and half give n^2 slots; the top_k best are found exactly
    from 2 n scores. value_dim: width of a value, followed by o_proj; without it values have width D and there is
    no o_proj (the paper). gated: beta = sigmoid(w x + b), b starting at gate_bias (Hydra), else beta = 1.
    query_norm: `rms` over a head's query, or `none`. The paper's batch norm is not offered: it makes a token's
    output depend on the other tokens, which breaks batch and segment independence.

    x: [B, T, D] -> y: [B, T, D]; no state. With key width k = 2 key_dim, parameters n^2 v + H 2 n key_dim +
    D H k (+ v D); FLOPs a token 2 D H k + 4 H n key_dim (+ 2 v D). Gradient reaches only the slots and half keys
    that were read. With top_k = n^2 it is soft attention over the whole table.
    Useful: 2 D H k + 4 H n key_dim (+ 2 v D) FLOPs a token; values that are read are weighted and summed
    elementwise.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_keys: PositiveInt = 64,
        key_dim: PositiveInt = 64,
        top_k: PositiveInt = 8,
        num_heads: PositiveInt = 1,
        value_dim: PositiveInt | None = None,
        gated: bool = False,
        gate_bias: float = -2.0,
        query_norm: Literal["none", "rms"] = "rms",
        kernel: str = "auto",
        device=None,
        dtype=None,
    ):
        super().__init__(dim)
        if top_k > num_keys**2:
            raise ValueError(f"top_k={top_k} is more than the num_keys^2 = {num_keys**2} slots; lower top_k")
        check_backend("product_key_lookup", kernel)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_keys, self.key_dim, self.top_k, self.num_heads = num_keys, key_dim, top_k, num_heads
        self.value_dim, self.gate_bias, self.kernel = value_dim or dim, gate_bias, kernel
        self.q_proj = Linear(dim, num_heads * 2 * key_dim, bias=False, **factory)
        self.q_norm = RMSNorm(2 * key_dim, **factory) if query_norm == "rms" else nn.Identity()
        self.sub_keys = nn.Parameter(torch.empty(num_heads, 2, num_keys, key_dim, **factory))
        self.values = nn.Parameter(torch.empty(num_keys**2, self.value_dim, **factory))
        self.o_proj = Linear(self.value_dim, dim, bias=False, **factory) if value_dim else None
        self.gate_proj = Linear(dim, 1, **factory) if gated else None
        self.metrics: dict[str, Tensor] = {}

    def reset_parameters(self) -> None:
        init_linear_(self.q_proj)
        if isinstance(self.q_norm, RMSNorm):
            self.q_norm.reset_parameters()
        bound = self.key_dim**-0.5
        nn.init.uniform_(self.sub_keys, -bound, bound)
        nn.init.normal_(self.values, std=self.value_dim**-0.5)
        if self.o_proj is not None:
            init_linear_(self.o_proj)
        if self.gate_proj is not None:
            nn.init.zeros_(self.gate_proj.weight)
            nn.init.constant_(self.gate_proj.bias, self.gate_bias)

    def forward(
        self, x: Tensor, *, state: State | None = None, positions: Tensor | None = None, doc_ids: Tensor | None = None
    ) -> Tensor:
        B, T, _ = x.shape
        query = self.q_norm(self.q_proj(x).view(B * T, self.num_heads, 2 * self.key_dim))
        out, indices, weights = product_key_lookup(query, self.sub_keys, self.values, self.top_k, backend=self.kernel)
        y = out.view(B, T, -1)
        if self.o_proj is not None:
            y = self.o_proj(y)
        if self.gate_proj is not None:
            y = torch.sigmoid(self.gate_proj(x)) * y
        if recording(self):
            self._measure(indices, weights.detach())
        return y

    @torch.no_grad()
    def _measure(self, indices: Tensor, weights: Tensor) -> None:
        # usage: share of slots read at all; kl: of the read weight's distribution from the uniform one
        slots = self.num_keys**2
        mass = weights.new_zeros(slots).scatter_add(0, indices.flatten(), weights.flatten())
        share = mass / mass.sum()
        kl = (share * (share.clamp(min=1e-20) * slots).log()).sum()
        self.metrics = {"usage": (mass > 0).to(mass.dtype).mean(), "kl": kl}

    def forward_flops(self, batch_size: int, seq_len: int, context_len: int = 0, streaming: bool = False) -> int:
        tokens = batch_size * seq_len
        scores = lookup_flops(tokens, self.num_heads, self.num_keys, 2 * self.key_dim)
        return linear_flops(tokens, self.q_proj, self.o_proj, self.gate_proj) + scores

    def vector_flops(self, batch_size: int, seq_len: int, context_len: int = 0) -> int:
        H, read = self.num_heads, self.num_heads * self.top_k
        token = work.RMS * H * 2 * self.key_dim if isinstance(self.q_norm, RMSNorm) else 0
        token += read * (work.SOFTMAX + 2 * self.value_dim)  # values weighted and summed
        token += 0 if self.gate_proj is None else work.SIGMOID + self.dim
        return batch_size * seq_len * token

    def activation_elements(self, batch_size: int, seq_len: int) -> int:
        # x; per head: query before and after its norm; as int64 the best of both halves, of their pairs and the slots;
        # weights
        kept, tokens = min(self.top_k, self.num_keys), batch_size * seq_len
        token = self.dim + self.num_heads * (2 * self.key_dim + 4 * kept + 5 * self.top_k)
        token += 6  # where each token's bag of slots begins, and what it holds
        if self.o_proj is not None:
            token += self.value_dim
        if self.gate_proj is not None:
            token += self.dim + 1  # output and gate
        norm = self.q_norm.activation_elements(tokens * self.num_heads) if isinstance(self.q_norm, RMSNorm) else 0
        return tokens * token + norm

    def active_params(self) -> int:
        read = min(self.num_heads * self.top_k, self.num_keys**2)
        return super().active_params() - self.values.numel() + read * self.value_dim

    def cost(self, batch_size: int, seq_len: int, context_len: int = 0, mode: Mode = "train") -> Cost:
        """As every block's; tokens read at most top_k slots per head each."""
        cost = super().cost(batch_size, seq_len, context_len, mode)
        slots = self.num_keys**2
        unread = slots - min(slots, batch_size * seq_len * self.num_heads * self.top_k)
        passes = 3 if mode == "train" else 1
        return cost.replace(bytes_read=cost.bytes_read - passes * unread * self.value_dim * self.itemsize)

    @property
    def expectation(self) -> str:
        return f"product_key: a head reads {self.top_k} values a token, no two of a call the same"

    def parallel_plan(self) -> ParallelPlan:
        names = ("q_proj", "q_norm", "sub_keys", "values", "o_proj", "gate_proj")
        return ParallelPlan(
            dict.fromkeys(names, "replicate"),
            context="token",
            reason="reads are few and scattered: shard the rows of `values` as data-parallel weights instead",
        )
