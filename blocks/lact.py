"""LaCT: test-time training in large chunks, beside a sliding window. Zhang et al. 2025, arXiv:2505.23884.

f_W(x) = W1 (silu(W0 x) * W2 x), one network a fast head; for each chunk of C tokens
o_t    = f_W(q_t)                                          the whole chunk is read first
G_i    = sum_t eta_i,t d<f_W(k_t), v_t> / dW_i  + mean_t(beta_t) G_i of the chunk before
W_i    = rows of W_i + (orthogonalised) G_i, rescaled to their first lengths
y      = W_o (window attention + scale_t * RMSNorm(o))
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.blocks.fast_weights import (
    FastWeightsState,
    LowRank,
    Weights,
    ascent,
    ascent_flops,
    orthogonalise,
    orthogonalise_flops,
    read,
    read_flops,
    row_norms,
)
from zoo.blocks.heads import default_num_heads
from zoo.blocks.kv_cache import RingKVCache, exact_size, kv_cache_bytes, ring_slots, segment_index
from zoo.blocks.norms import RMSNorm
from zoo.blocks.recurrent import wide
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
from zoo.kernels.attention import attention, attention_flops
from zoo.kernels.dispatch import check_backend
from zoo.kernels.linear import Linear
from zoo.kernels.rope import rope
from zoo.registry import register
from zoo.schema import NonNegativeInt, PositiveFloat, PositiveInt
from zoo.segments import handed_on

BASE_RATE = 1e-3  # learning rate of a token where lr_proj says 0


@register(
    "lact",
    kind="mixer",
    paper="arXiv:2505.23884",
    ops=("attention", "rope"),
    state_growth="constant",
    relations=(
        "lact(num_heads=4, chunk_size=16, window=20) == attention(num_heads=4, window=20, qk_norm='full', "
        "norm_eps=1e-5, rope_base=500000.0) at ttt_norm.weight=0, qkv.weight[:64]=q_proj.weight, "
        "qkv.weight[64:128]=k_proj.weight, qkv.weight[128:]=v_proj.weight",
    ),
    examples=(
        {"num_heads": 4, "chunk_size": 16},
        {"num_heads": 2, "chunk_size": 12, "window": 20, "momentum": True, "output_scale": True, "inter_multi": 1.5},
        {"num_heads": 4, "num_fast_heads": 2, "chunk_size": 16, "momentum": True, "muon": True, "low_rank": 4},
    ),
)
class LaCT(Block):
    """Large-chunk test-time training: a SwiGLU network trained on each chunk, read by the next; and a window.

    q, k, v = W_qkv x, q and k RMS-normalised. Window attention takes them as they are. The fast network takes
    silu(q s_q + b_q), the same for k, and silu(v); q and k at unit length in each fast head, all rotated. A chunk of
    C = chunk_size tokens first reads f_W(q), then makes one step on -sum <f_W(k), v> with three learning rates
    softplus(.) for each token and head, `momentum` averaged over the chunk, `muon` to orthogonalise the step, and
    rows rescaled to their initial lengths. y = W_o (window attention + silu(W_s x) RMSNorm_head(f_W(q))), the
    factor silu(W_s x) with `output_scale`. `low_rank`: W0 and W2 start as products of that rank plus I / 2.
    x: [B, T, D] -> y: [B, T, D]; 18 D d_h FLOPs a token for the network, d_h = inter_multi D / num_fast_heads.
    No token reads its own chunk, so the window (default C) must reach over one. Chunks are counted from each
    document's start. State: the weights (and the last step), the open chunk, the window; a chunk is learnt when
    it is full, so decoding equals the full pass. With C >= T it is a fixed network beside window attention.
    Useful: 4 D FLOPs for each pair in the window, and the network's for reading and learning.
    """

    not_decayed = ("qk_scale", "qk_offset")
    matrices = ("w0", "w1", "w2")

    def __init__(
        self,
        dim: int,
        *,
        num_heads: PositiveInt | None = None,
        num_fast_heads: PositiveInt = 4,
        inter_multi: PositiveFloat = 1.0,
        chunk_size: PositiveInt = 2048,
        window: PositiveInt | None = None,
        momentum: bool = False,
        muon: bool = False,
        output_scale: bool = False,
        low_rank: NonNegativeInt = 0,
        rope_base: PositiveFloat = 500000.0,
        kernel: str = "auto",
        device=None,
        dtype=None,
    ):
        super().__init__(dim)
        check_backend("attention", kernel)
        self.num_heads, self.num_fast_heads = num_heads or default_num_heads(dim), num_fast_heads
        if dim % self.num_heads or dim // self.num_heads % 2:
            raise ValueError(f"num_heads={self.num_heads} must cut dim={dim} into heads of even width")
        if dim % num_fast_heads:
            raise ValueError(f"num_fast_heads={num_fast_heads} must divide dim={dim}")
        self.head_dim, self.fast_dim = dim // self.num_heads, dim // num_fast_heads
        self.hidden_dim = int(self.fast_dim * inter_multi)
        if self.hidden_dim < 1:
            raise ValueError(f"inter_multi={inter_multi} leaves no hidden channel of {self.fast_dim}: raise it")
        self.chunk_size, self.window = chunk_size, window or chunk_size
        if self.window < chunk_size:
            raise ValueError(
                f"window={window} is below chunk_size={chunk_size}, so tokens of a chunk could not see each other"
            )
        self.muon, self.rope_base, self.kernel = muon, rope_base, kernel
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        H, d, h = num_fast_heads, self.fast_dim, self.hidden_dim
        self.qkv = Linear(dim, 3 * dim, bias=False, **factory)
        self.q_norm, self.k_norm = (RMSNorm(dim, eps=1e-5, **factory) for _ in range(2))
        self.qk_scale = nn.Parameter(torch.empty(dim, 2, **factory))
        self.qk_offset = nn.Parameter(torch.empty(dim, 2, **factory))
        if low_rank:
            self.w0, self.w2 = (LowRank(H, h, d, low_rank, **factory) for _ in range(2))
        else:
            self.w0, self.w2 = (nn.Parameter(torch.empty(H, h, d, **factory)) for _ in range(2))
        self.w1 = nn.Parameter(torch.empty(H, d, h, **factory))
        self.lr_proj = Linear(dim, 3 * H, **factory)
        self.momentum_proj = Linear(dim, H, **factory) if momentum else None
        self.ttt_scale_proj = Linear(dim, H, **factory) if output_scale else None
        self.ttt_norm = RMSNorm(d, eps=1e-5, **factory)
        self.o_proj = Linear(dim, dim, bias=False, **factory)

    def projections(self) -> tuple[nn.Linear | None, ...]:
        """Every linear layer."""
        return self.qkv, self.lr_proj, self.momentum_proj, self.ttt_scale_proj, self.o_proj

    def reset_parameters(self) -> None:
        for linear in self.projections():
            if linear is not None:
                init_linear_(linear)
        for norm in (self.q_norm, self.k_norm, self.ttt_norm):
            norm.reset_parameters()
        nn.init.ones_(self.qk_scale)
        nn.init.zeros_(self.qk_offset)
        for w in (self.w0, self.w1, self.w2):
            if isinstance(w, LowRank):
                w.reset_parameters()
            else:
                nn.init.normal_(w, std=w.shape[-1] ** -0.5)

    def forward(
        self,
        x: Tensor,
        *,
        state: FastWeightsState | None = None,
        positions: Tensor | None = None,
        doc_ids: Tensor | None = None,
    ) -> Tensor:
        refuse_packed_streaming(state, doc_ids)
        B, T, _ = x.shape
        length = None if state is None else state.near.length.clone()
        order = positions_from(doc_ids, B, T, x.device) if length is None else segment_index(length, T)
        positions = order if positions is None else positions
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k = self.q_norm(q), self.k_norm(k)
        near = self._attend(q, k, v, positions, state, doc_ids)
        scale, offset = self.qk_scale.unbind(1), self.qk_offset.unbind(1)
        q, k = (self._fast(h * s + b, positions) for h, s, b in zip((q, k), scale, offset))
        v = F.silu(v).unflatten(-1, (self.num_fast_heads, self.fast_dim))
        rates = self._rates(x)
        if state is not None and length is not None:
            far = self._stream(q, k, v, rates, state, length)
        elif doc_ids is not None:
            far = self._packed(q, k, v, rates, order, doc_ids)
        else:
            far = self._chunks(q, k, v, rates)
        far = self.ttt_norm(far)
        if self.ttt_scale_proj is not None:
            far = far * F.silu(self.ttt_scale_proj(x))[..., None]
        return self.o_proj(near + far.flatten(2))

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, state: FastWeightsState | None, doc_ids: Tensor | None
    ) -> Tensor:
        q, k, v = (h.unflatten(-1, (self.num_heads, self.head_dim)) for h in (q, k, v))
        q, k = (rope(h, positions, base=self.rope_base) for h in (q, k))
        q_index = k_index = None
        if state is not None:
            empty = state.near.size == 0  # then the keys are those of the segment, in order
            k, v, k_index, q_index = state.near.append(k, v)
            if empty:
                q_index = k_index = None
        o, _ = attention(
            q, k, v, window=self.window, q_index=q_index, k_index=k_index, q_doc_ids=doc_ids, k_doc_ids=doc_ids,
            backend=self.kernel,
        )  # fmt: skip
        return o.flatten(2)

    def _fast(self, x: Tensor, positions: Tensor) -> Tensor:
        """Queries or keys [B, T, H, d] of the fast network: unit length in each fast head, rotated as in attention."""
        x = F.silu(x).unflatten(-1, (self.num_fast_heads, self.fast_dim))
        unit = (x / (row_norms(wide(x)) + 1e-5)).to(x.dtype)
        turned = rope(unit.reshape(*x.shape[:2], self.num_heads, self.head_dim), positions, base=self.rope_base)
        return turned.reshape(x.shape)

    def _rates(self, x: Tensor) -> Tensor:
        """[B, T, 3 H] learning rates of W0, W1, W2, head by head; then H momenta where there are some. In fp32."""
        logit = wide(self.lr_proj(x)) + math.log(math.expm1(BASE_RATE))
        rates = torch.logaddexp(logit, logit.new_zeros(()))  # softplus
        if self.momentum_proj is None:
            return rates
        return torch.cat([rates, wide(self.momentum_proj(x)).sigmoid()], -1)

    def _initial(self, batch_size: int) -> Weights:
        weights = (wide(w() if isinstance(w, LowRank) else w) for w in (self.w0, self.w1, self.w2))
        return tuple(w.expand(batch_size, -1, -1, -1) for w in weights)

    def _still(self, weights: Weights) -> Weights:
        """The step before the first one; nothing without momentum."""
        return tuple(torch.zeros_like(w) for w in weights) if self.momentum_proj is not None else ()

    def _learn(
        self, weights: Weights, step: Weights, norms: Weights, k: Tensor, v: Tensor, rates: Tensor
    ) -> tuple[Weights, Weights]:
        """Weights and step after one chunk; norms: the row lengths to keep."""
        H = self.num_fast_heads
        new = ascent(weights, k, v, rates[..., : 3 * H].unflatten(-1, (H, 3)))
        if step:
            beta = rates[..., 3 * H :].mean(1)[..., None, None]
            step = new = tuple(g + beta * old for g, old in zip(new, step))
        if self.muon:
            new = tuple(orthogonalise(g, k.dtype) for g in new)
        moved = (w + g for w, g in zip(weights, new))
        return tuple(w / (row_norms(w) + 1e-5) * n for w, n in zip(moved, norms)), step

    def _chunks(self, q: Tensor, k: Tensor, v: Tensor, rates: Tensor) -> Tensor:
        """All tokens at once; nobody would read what the last chunk teaches."""
        weights = self._initial(q.shape[0])
        step, norms = self._still(weights), tuple(map(row_norms, weights))
        queries, *chunks = (h.split(self.chunk_size, 1) for h in (q, k, v, rates))
        outputs = [read(weights, queries[0])]
        for query, *chunk in zip(queries[1:], *chunks):
            weights, step = self._learn(weights, step, norms, *chunk)
            outputs.append(read(weights, query))
        return torch.cat(outputs, 1)

    def _packed(self, q: Tensor, k: Tensor, v: Tensor, rates: Tensor, order: Tensor, doc_ids: Tensor) -> Tensor:
        """Documents start anywhere, but at most T / C chunks are full: each of them, in order, teaches the tokens
        of the next one. All others read the initial weights."""
        (B, T), C = order.shape, self.chunk_size
        row, offset = torch.arange(B, device=q.device)[:, None], torch.arange(1, C + 1, device=q.device)
        full = order % C == C - 1
        initial = weights = self._initial(B)
        still = step = self._still(weights)
        norms = tuple(map(row_norms, weights))
        out = F.pad(read(initial, q), (0, 0, 0, 0, 0, 1))  # and a place for tokens that are nobody's
        ends = (~full).long().argsort(dim=1, stable=True)
        for n in range(T // C):
            last = ends[:, n : n + 1]
            first = (order[row, last] == C - 1)[..., None, None]  # chunk of its document
            weights = tuple(torch.where(first, w0, w) for w0, w in zip(initial, weights))
            step = tuple(torch.where(first, g0, g) for g0, g in zip(still, step))
            chunk = (last - C + offset).clamp(min=0)
            weights, step = self._learn(weights, step, norms, *(h[row, chunk] for h in (k, v, rates)))
            reader = (last + offset).clamp(max=T - 1)
            taught = full[row, last] & (last + offset < T) & (doc_ids[row, reader] == doc_ids[row, last])
            out = out.index_put((row, torch.where(taught, reader, T)), read(weights, q[row, reader]))
        return out[:, :T]

    def _stream(
        self, q: Tensor, k: Tensor, v: Tensor, rates: Tensor, state: FastWeightsState, length: Tensor
    ) -> Tensor:
        """Pieces that end no later than the first open chunk of any row: in each, every row has one set of weights.
        Inside the segment gradients flow; what the state holds from before has none."""
        (B, T), C = q.shape[:2], self.chunk_size
        initial = self._initial(B)
        weights = tuple(w + moved for w, moved in zip(initial, state.moved))
        step, learnt, outputs, at = tuple(g.clone() for g in state.step), False, [], 0
        while at < T:
            if state.pending + T - at >= C:  # a chunk may fill: one look at the rows
                state.pending = exact_size((length + at) % C)
            piece = min(T - at, C - state.pending)
            outputs.append(read(weights, q[:, at : at + piece]))
            at, state.pending = at + piece, state.pending + piece
            if state.pending == C:
                learnt = True
                rows = ((length + at) % C == 0).nonzero()[:, 0]
                early, start = max(C - at, 0), max(at - C, 0)  # tokens that came before this segment
                weights_now, step_now = (tuple(w[rows] for w in part) for part in (weights, step))
                norms = tuple(row_norms(w[rows]) for w in initial)
                chunk = (
                    torch.cat([old[rows, :early].to(new.dtype), new[rows, start:at]], 1)
                    for old, new in ((state.k, k), (state.v, v), (state.rates, rates))
                )
                new = self._learn(weights_now, step_now, norms, *chunk)
                weights, step = (
                    tuple(w.index_copy(0, rows, n) for w, n in zip(old, part))
                    for old, part in zip((weights, step), new)
                )
                state.pending = exact_size((length + at) % C)
        state.keep(k, v, rates, length)
        if learnt:
            for kept, w, w0 in zip(state.moved, weights, initial):
                kept.copy_(handed_on(w - w0))
            for kept, g in zip(state.step, step):
                kept.copy_(handed_on(g))
        return torch.cat(outputs, 1)

    # ------------------------------------------------------------------------------------ state and cost
    def init_state(self, batch_size: int, max_len: int | None = None) -> FastWeightsState:
        like = self.o_proj.weight.detach()
        near = (batch_size, max_len, self.num_heads, self.head_dim)
        kept = like.new_zeros(0, dtype=state_dtype(like.dtype))
        H, d, h, slots = self.num_fast_heads, self.fast_dim, self.hidden_dim, self._slots(max_len)

        def weights() -> Iterator[Tensor]:
            return (kept.new_zeros(batch_size, H, *shape) for shape in ((h, d), (d, h), (h, d)))

        return FastWeightsState(
            RingKVCache.create(*near, window=self.window, like=like),
            *weights(),
            *(weights() if self.momentum_proj is not None else (None,) * 3),
            k=like.new_zeros(batch_size, slots, H, d),
            v=like.new_zeros(batch_size, slots, H, d),
            rates=kept.new_zeros(batch_size, slots, self._num_rates),
        )

    def _slots(self, max_len: int | None) -> int:
        return self.chunk_size if max_len is None else min(self.chunk_size, max_len)

    @property
    def _num_rates(self) -> int:
        return self.num_fast_heads * (3 if self.momentum_proj is None else 4)

    def pieces(self, seq_len: int, streaming: bool = False) -> int:
        return -(-seq_len // self.chunk_size)

    def state_bytes(self, batch_size: int, max_len: int) -> int:
        itemsize, kept = self.itemsize, max(self.itemsize, 4)
        near = kv_cache_bytes(
            batch_size, ring_slots(max_len, self.window), self.num_heads, self.head_dim, self.head_dim, itemsize
        )
        weights = 3 * self.hidden_dim * self.dim * kept * (1 if self.momentum_proj is None else 2)
        chunk = self._slots(max_len) * (2 * self.dim * itemsize + self._num_rates * kept)
        return near + batch_size * (weights + chunk)

    def forward_flops(self, batch_size: int, seq_len: int, context_len: int = 0, streaming: bool = False) -> int:
        C, keys = self.chunk_size, context_len + seq_len
        if context_len:
            slots = ring_slots(None, self.window)
            keys = min(keys, slots) if seq_len == 1 else min(context_len, slots) + seq_len
        near = attention_flops(
            batch_size, seq_len, keys, self.num_heads, self.head_dim, window=self.window, plain=not context_len,
            fused=self.kernel in ("auto", "sdpa"),
        )  # fmt: skip
        learnt = (context_len + seq_len) // C - context_len // C if streaming else (seq_len - 1) // C
        return near + self._flops_apart_from_window(batch_size, seq_len, learnt)

    def useful_flops(self, batch_size: int, seq_len: int, context_len: int = 0) -> int:
        pairs = work.window_pairs(seq_len, context_len, self.window)
        near = batch_size * work.attention_work(self.num_heads, pairs, self.head_dim, self.head_dim)
        learnt = self._learnt(seq_len, context_len)
        return near + self._flops_apart_from_window(batch_size, seq_len, learnt)

    def _flops_apart_from_window(self, batch_size: int, seq_len: int, learnt: int) -> int:
        H, d, h = self.num_fast_heads, self.fast_dim, self.hidden_dim
        chunk = ascent_flops(self.chunk_size, d, h) + (3 * orthogonalise_flops(d, h) if self.muon else 0)
        far = batch_size * H * (read_flops(seq_len, d, h) + learnt * chunk)
        if isinstance(self.w0, LowRank):
            far += 2 * H * 2 * d * h * self.w0.w_left.shape[-1]
        return linear_flops(batch_size * seq_len, *self.projections()) + far

    def _learnt(self, seq_len: int, context_len: int) -> int:
        """Chunks whose step a later token reads, or could."""
        return (context_len + seq_len - (context_len == 0)) // self.chunk_size - context_len // self.chunk_size

    def vector_flops(self, batch_size: int, seq_len: int, context_len: int = 0) -> int:
        H, d, h = self.num_fast_heads, self.fast_dim, self.hidden_dim
        # q-k norms; two rotations of q and k; silu, scale and offset, unit length; silu of v; norm and its scale
        token = self.dim * 2 * (work.RMS + 2 * work.ROPE + work.SILU + 2 + work.UNIT)
        token += self.dim * (work.SILU + work.RMS + (self.ttt_scale_proj is not None))
        token += H * ((work.SILU + 1) * h + 12 * h + d)  # reading; the gradient and its rates
        token += self._num_rates * 2
        step = 3 * H * d * h * (5 + (self.momentum_proj is not None) * 2)  # added, and rows rescaled
        scores = self.num_heads * work.window_pairs(seq_len, context_len, self.window)
        learnt = self._learnt(seq_len, context_len)
        return batch_size * (seq_len * token + learnt * step + work.SOFTMAX * scores)

    def activation_elements(self, batch_size: int, seq_len: int) -> int:
        H, d, h, muon = self.num_fast_heads, self.fast_dim, self.hidden_dim, self.muon
        # a token: x, qkv, q and k normed, rotated and for the network with their lengths, v twice, both outputs, their
        # sum; cos and sin four times; rates; the network's query, both layers and their product
        token = 20 * self.dim + 4 * self.head_dim + self.num_heads + 2 + H * (11 + 4 * h + 2 * d)
        token += 2 * H * (self.momentum_proj is not None)
        token += (self.dim + 2 * H) * (self.ttt_scale_proj is not None)
        # a token that is learnt: keys, values and layers with their gradients and rates. A chunk: weights before and
        # after their norm, the step and its parts (with Muon those of five rounds, and their Gram matrices), lengths of
        # rows
        learnt = (seq_len - 1) // self.chunk_size
        if not learnt:  # neither keys nor rates are used
            token -= 4 * self.dim + self.head_dim + 8 * H
        matrices = 27 if muon else 12 if self.momentum_proj is not None else 9
        chunk = self.chunk_size * (13 * h + 6 * d) + matrices * h * d + 30 * muon * min(h, d) ** 2 + 4 * h + 2 * d
        first = (6 if learnt else 3) * h * d
        return batch_size * (seq_len * token + H * (learnt * chunk + first))

    def parallel_plan(self) -> ParallelPlan:
        return ParallelPlan(context="gather_input", reason="q_norm and k_norm normalise over the channels of all heads")
