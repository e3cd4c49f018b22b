"""PaTH attention: the position of a key is the product of Householder-like matrices of the tokens after it.
Yang et al. 2025, arXiv:2505.16381.

    H_t = I - beta_t w_t w_t^T,   beta_t = 2 sigmoid(W_beta x_t),   w_t = normalise(silu(conv(W_w x)_t))
    s_ij = q_i^T H_i H_{i-1} ... H_{j+1} k_j / sqrt(D)  [+ G_i - G_j,  G the running sum of log forget gates]
    o_i  = sum_j softmax_j(s_ij) v_j
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from zoo.blocks.heads import grouped_heads
from zoo.blocks.kv_cache import KVCache
from zoo.blocks.recurrent import ShortConv, l2_normalise, previous, wide
from zoo.contract import (
    Block,
    ParallelPlan,
    State,
    init_linear_,
    linear_flops,
    refuse_packed_streaming,
    state_dtype,
)
from zoo.kernels import work
from zoo.kernels.flops import triangular_solve_flops
from zoo.kernels.linear import Linear
from zoo.kernels.precision import no_autocast
from zoo.registry import register
from zoo.schema import PositiveInt


@dataclass
class PaTHState(State):
    """The cache, its keys multiplied by the matrices of all later tokens and kept in fp32, as every token rewrites
    them; the log forget gates summed after each key [B, slots, Hq] (no heads without the gate); the inputs
    [B, conv_size - 1, Hkv * D] that the convolution still needs."""

    cache: KVCache
    forgotten: Tensor
    tail: Tensor


@register(
    "path_attention",
    kind="mixer",
    paper="arXiv:2505.16381",
    ops=("short_conv",),
    state_growth="linear",
    relations=(
        "path_attention(chunk_size=8) == path_attention(chunk_size=64)",
        "path_attention(num_heads=4, num_kv_heads=2, forget_gate=True, chunk_size=24) =="
        " path_attention(num_heads=4, num_kv_heads=2, forget_gate=True, chunk_size=99)",
        "path_attention(num_heads=4, num_kv_heads=2) == attention(num_heads=4, num_kv_heads=2, rope=False) at "
        "bt_proj.bias=-inf",
        "path_attention(num_heads=4, forget_gate=True) == path_attention(num_heads=4) at g_proj.bias=inf",
    ),
    examples=(
        {"num_heads": 4, "num_kv_heads": 2, "chunk_size": 16},
        {"num_heads": 2, "num_kv_heads": 1, "head_dim": 12, "forget_gate": True, "conv_size": 4, "w_rank": 5},
    ),
)
class PaTHAttention(Block):
    """Softmax attention whose positions are accumulated Householder-like transformations (PaTH).

    s_ij = q_i^T (prod_{j<l<=i} H_l) k_j / sqrt(D), H_l = I - beta_l w_l w_l^T, beta_l in (0, 2), |w_l| = 1, one H a
    key head; w from a projection of rank w_rank, a causal convolution over conv_size tokens and SiLU. No RoPE.
    `forget_gate` (PaTH-FoX) adds sum_{j<l<=i} log sigmoid(W_g x_l) to the scaled scores (fla scales it too).
    x: [B, T, D] -> y: [B, T, D]. The tokens are taken in chunks: inside one, the product is the solution of a
    triangular system (UT transform); after it, all earlier keys are multiplied by the chunk's product. That is twice
    the work of attention, and T^2 / chunk_size keys are kept for backward. State: keys (fp32), values, gates and the
    convolution's inputs; a decoded token rewrites every key of the cache.
    beta = 0 is attention without position; beta = 2 reflects, so that |H k| = |k|.
    Useful: 4 d FLOPs a causal pair for each query head, and as many for each key head, whose keys are rewritten.
    """

    cuts_gradient = "every segment rewrites the keys of those before it"

    def __init__(
        self,
        dim: int,
        *,
        num_heads: PositiveInt | None = None,
        num_kv_heads: PositiveInt | None = None,
        head_dim: PositiveInt | None = None,
        w_rank: PositiveInt = 32,
        conv_size: PositiveInt = 3,
        forget_gate: bool = False,
        chunk_size: PositiveInt = 64,
        device=None,
        dtype=None,
    ):
        super().__init__(dim)
        self.num_heads, self.num_kv_heads, self.head_dim = grouped_heads(dim, num_heads, num_kv_heads, head_dim)
        self.conv_size, self.chunk_size = conv_size, chunk_size
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        q_width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q_proj = Linear(dim, q_width, bias=False, **factory)
        self.k_proj = Linear(dim, kv_width, bias=False, **factory)
        self.v_proj = Linear(dim, kv_width, bias=False, **factory)
        self.w_proj = nn.Sequential(
            Linear(dim, w_rank, bias=False, **factory), Linear(w_rank, kv_width, bias=False, **factory)
        )
        self.w_conv1d = ShortConv(kv_width, conv_size, **factory)
        self.bt_proj = Linear(dim, self.num_kv_heads, bias=True, **factory)
        self.g_proj = Linear(dim, self.num_heads, bias=True, **factory) if forget_gate else None
        self.o_proj = Linear(q_width, dim, bias=False, **factory)

    def _linears(self) -> list[nn.Linear]:
        return [m for m in self.modules() if isinstance(m, nn.Linear)]

    def reset_parameters(self) -> None:
        for linear in self._linears():
            init_linear_(linear)
        self.w_conv1d.reset_parameters()

    def init_state(self, batch_size: int, max_len: int | None = None) -> PaTHState:
        like = self.reference_parameter.detach()
        cache = KVCache.create(batch_size, max_len, self.num_kv_heads, self.head_dim, like=like)
        cache.k = cache.k.to(state_dtype(like.dtype))
        gated = 0 if self.g_proj is None else self.num_heads
        tail = like.new_zeros(batch_size, self.conv_size - 1, self.num_kv_heads * self.head_dim)
        return PaTHState(cache, cache.k.new_zeros(batch_size, cache.k.shape[1], gated), tail)

    def forward(
        self,
        x: Tensor,
        *,
        state: PaTHState | None = None,
        positions: Tensor | None = None,
        doc_ids: Tensor | None = None,
    ) -> Tensor:
        refuse_packed_streaming(state, doc_ids)
        B, T, _ = x.shape
        D, group = self.head_dim, self.num_heads // self.num_kv_heads
        w = self.w_conv1d(self.w_proj(x), None if state is None else state.tail, doc_ids)
        w = l2_normalise(wide(w).unflatten(-1, (-1, D))).transpose(1, 2)
        beta = 2 * wide(self.bt_proj(x)).sigmoid().transpose(1, 2)
        gate = None
        if self.g_proj is not None:
            gate = F.logsigmoid(wide(self.g_proj(x))).transpose(1, 2).unflatten(1, (-1, group))
        q = wide(self.q_proj(x)).view(B, T, -1, group, D).permute(0, 2, 3, 1, 4)
        k, v = (wide(p(x)).view(B, T, -1, D).transpose(1, 2) for p in (self.k_proj, self.v_proj))
        # whom a token sees: the earlier ones of the same number; -1 marks empty slots of the cache
        owner = torch.zeros(B, T, dtype=torch.int64, device=x.device) if doc_ids is None else doc_ids
        past, keys, forgotten = 0, k[:, :, :0], None if gate is None else gate[..., :0]
        if state is not None:
            past = state.cache.size
            keys = previous(state.cache.k[:, :past]).transpose(1, 2)
            v = torch.cat([state.cache.v[:, :past].transpose(1, 2).to(v.dtype), v], 2)
            owner = torch.cat([state.cache.key_index().clamp(max=0), owner], 1)
            if gate is not None:
                forgotten = previous(state.forgotten[:, :past]).transpose(1, 2).unflatten(1, (-1, group))
        outputs = []
        recompute = self.chunk_size < T and torch.is_grad_enabled()
        for start in range(0, T, self.chunk_size):
            stop = min(start + self.chunk_size, T)
            here, seen = slice(start, stop), slice(0, past + stop)
            given = (
                q[..., here, :], k[:, :, here], w[:, :, here], beta[:, :, here],
                None if gate is None else gate[..., here], keys, v[:, :, seen], forgotten, owner[:, seen],
                stop < T or state is not None,
            )  # fmt: skip
            o, keys, forgotten = (
                checkpoint(self._chunk, *given, use_reentrant=False) if recompute else self._chunk(*given)
            )
            outputs.append(o)
        if state is not None:
            self._store(state, past, keys, v[:, :, past:], forgotten)
        o = torch.cat(outputs, 3).permute(0, 3, 1, 2, 4).flatten(2)
        return self.o_proj(o.to(x.dtype))

    def _chunk(
        self, q: Tensor, k: Tensor, w: Tensor, beta: Tensor, gate: Tensor | None, keys: Tensor, values: Tensor,
        forgotten: Tensor | None, owner: Tensor, more: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
        """Outputs [B, Hkv, G, C, D] of C tokens that follow S earlier ones; with `more`, all S + C keys and sums of log
        forget gates as the next chunk needs them.

        q: [B, Hkv, G, C, D]; k, w: [B, Hkv, C, D]; beta: [B, Hkv, C]; gate: [B, Hkv, G, C]; keys: [B, Hkv, S, D], with
        the matrices up to the chunk; values: [B, Hkv, S + C, D]; forgotten: [B, Hkv, G, S]; owner: [B, S + C].
        """
        G, C, D = q.shape[2:]
        S = keys.shape[2]
        with no_autocast(q.device):
            rows = q.flatten(2, 3)
            # H_i ... H_{j+1} k_j = k_j - sum_m w_m a_mj with (I + tril(beta w w^T, -1)) a = beta tril(w k^T, -1)
            system = beta[..., None] * (w @ w.mT)
            right = beta[..., None] * torch.cat([w, (w @ k.mT).tril(-1)], -1)
            a = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
            a_far, a_near = a.split([D, C], -1)  # for a key before the chunk: a = a_far k
            through = (rows @ w.mT).unflatten(2, (G, C)).tril().flatten(2, 3)
            far = (rows - through @ a_far) @ keys.mT
            near = rows @ k.mT - through @ a_near
            s = torch.cat([far, near], -1).unflatten(2, (G, C)) * D**-0.5
            sums = None
            if gate is not None and forgotten is not None:
                total = gate.cumsum(-1)
                since = torch.cat([forgotten, -total], -1)  # of each key, up to the chunk's start
                s = s + (total[..., None] + since[..., None, :])
                sums = since + total[..., -1:]
            seen = (owner[:, S:, None] == owner[:, None]) & owner.new_ones(C, S + C).tril(S).bool()
            p = s.masked_fill(~seen[:, None, None], float("-inf")).softmax(-1)
            o = (p.flatten(2, 3) @ values).unflatten(2, (G, C))
            if not more:
                return o, keys, forgotten
            keys = torch.cat([keys - (keys @ a_far.mT) @ w, k - a_near.mT @ w], 2)
            return o, keys, sums

    def _store(self, state: PaTHState, past: int, keys: Tensor, v: Tensor, forgotten: Tensor | None) -> None:
        """Rewrite what the cache holds and append the segment."""
        cache, keys = state.cache, keys.detach().transpose(1, 2)
        cache.k[:, :past].copy_(keys[:, :past])
        _, _, _, slots = cache.append(keys[:, past:], v.detach().transpose(1, 2))
        if (missing := cache.k.shape[1] - state.forgotten.shape[1]) > 0:
            state.forgotten = F.pad(state.forgotten, (0, 0, 0, missing))
        if forgotten is not None:
            sums = forgotten.detach().flatten(1, 2).transpose(1, 2)
            state.forgotten[:, :past].copy_(sums[:, :past])
            row = torch.arange(sums.shape[0], device=sums.device)[:, None]
            state.forgotten.index_put_((row, slots), sums[:, past:])

    def forward_flops(self, batch_size: int, seq_len: int, context_len: int = 0, streaming: bool = False) -> int:
        Hq, Hkv, D = self.num_heads, self.num_kv_heads, self.head_dim
        flops = linear_flops(batch_size * seq_len, *self._linears())
        for start in range(0, seq_len, self.chunk_size):
            C, S = min(self.chunk_size, seq_len - start), context_len + start
            one = Hkv * (4 * C * C * D + triangular_solve_flops(C, D + C))
            one += 2 * Hq * C * (C * (4 * D + C) + 2 * S * D)
            if streaming or start + C < seq_len:
                one += 2 * Hkv * C * D * (C + 2 * S)
            flops += batch_size * one
        return flops

    def useful_flops(self, batch_size: int, seq_len: int, context_len: int = 0) -> int:
        H, Hkv, D = self.num_heads, self.num_kv_heads, self.head_dim
        pairs = work.pairs(seq_len, context_len)
        rewritten = 4 * Hkv * D * (pairs - seq_len)  # every token's matrix changes every earlier key
        attend = work.attention_work(H, pairs, D, D) + rewritten
        return linear_flops(batch_size * seq_len, *self._linears()) + batch_size * attend

    def vector_flops(self, batch_size: int, seq_len: int, context_len: int = 0) -> int:
        H, width = self.num_heads, self.num_kv_heads * self.head_dim
        token = (2 * self.conv_size + work.SILU + work.UNIT) * width + self.num_kv_heads * (work.SIGMOID + 1)
        token += 0 if self.g_proj is None else H
        score = work.SOFTMAX + (self.g_proj is not None) * 2  # the gates since the key, added
        return batch_size * (seq_len * token + score * H * work.pairs(seq_len, context_len))

    def pieces(self, seq_len: int, streaming: bool = False) -> int:
        return -(-seq_len // self.chunk_size)

    def state_bytes(self, batch_size: int, max_len: int) -> int:
        width, itemsize, real = self.num_kv_heads * self.head_dim, self.itemsize, max(self.itemsize, 4)
        gated = 0 if self.g_proj is None else self.num_heads
        token = width * (itemsize + real) + gated * real
        return batch_size * (max_len * token + (self.conv_size - 1) * width * itemsize + 8)

    def activation_elements(self, batch_size: int, seq_len: int) -> int:
        # x; q, k, v; w between its maps, before and after its convolution, of unit length; beta and what it is made of;
        # gates with what their logsigmoid keeps; owners, o
        Hq, Hkv, D = self.num_heads, self.num_kv_heads, self.head_dim
        gated = 0 if self.g_proj is None else Hq
        chunks = -(-seq_len // self.chunk_size)
        token = self.dim + len(self.w_proj[0].weight) + 2 * Hq * D + 5 * Hkv * D + 3 * Hkv + 3 * gated + 2
        kept = seq_len * token
        if chunks > 1:  # each chunk keeps the keys and sums it started with, and computes the rest again
            kept += (Hkv * D + gated) * self.chunk_size * chunks * (chunks - 1) // 2
        else:  # scores, their parts and probabilities, the products with w
            kept += seq_len * (Hq * seq_len * 6 + 3 * Hq * D + 3 * Hkv * (D + seq_len))
        return batch_size * kept

    def parallel_plan(self) -> ParallelPlan:
        names = ("q_proj", "k_proj", "v_proj", "w_proj.1", "w_conv1d", "bt_proj")
        tensor = {name: "column" for name in names} | {"w_proj.0": "replicate", "o_proj": "row"}
        if self.g_proj is not None:
            tensor["g_proj"] = "column"
        return ParallelPlan(tensor, units=self.num_kv_heads, context="gather_input")
