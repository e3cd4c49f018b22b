"""mLSTM, the mixer of xLSTM: linear attention with an exponential input gate, a forget gate and a normaliser.
Beck et al. 2024, arXiv:2405.04517; the layer of xLSTM-7B: Beck et al. 2025, arXiv:2503.13427.

C_t = f_t C_{t-1} + i_t k_t v_t^T,  n_t = f_t n_{t-1} + i_t k_t,  h_t = C_t^T q_t / max(|n_t . q_t|, 1)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.blocks.grafting import decay_logit, memories, take, value_scale
from zoo.blocks.recurrent import LinearState, default_heads, previous, wide
from zoo.contract import Block, ParallelPlan, init_linear_, linear_flops, refuse_packed_streaming, state_dtype
from zoo.kernels import work
from zoo.kernels.dispatch import check_backend
from zoo.kernels.linear import Linear
from zoo.kernels.linear_attention import INTERVAL, linear_attention
from zoo.kernels.linear_attention import flops as linear_attention_flops
from zoo.registry import register
from zoo.row import Slice, current, cuts, fold
from zoo.schema import PositiveFloat, PositiveInt
from zoo.segments import handed_on


@dataclass
class MatrixLSTMState(LinearState):
    """memory: [B, H, Dk, Dv + 1], C and in its last column n, both times exp(-m); m: [B, H]."""

    m: Tensor


class HeadLayerNorm(nn.Module):
    """Layer norm of each head without bias. x: [B, T, H, width] -> [B, T, H * width]; weight: [H * width]."""

    def __init__(self, width: int, eps: float, *, device=None, dtype=None):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = wide(x)
        return F.layer_norm(x, x.shape[-1:], eps=self.eps).flatten(-2) * wide(self.weight)


def soft_cap(x: Tensor, cap: float | None) -> Tensor:
    """cap * tanh(x / cap): nearly x where |x| is far below cap, never beyond it."""
    return x if cap is None else cap * torch.tanh(x / cap)


def document_starts(doc_ids: Tensor | None, like: Tensor) -> Tensor:
    """[B, T, 1], true at the first token of a row and of a document. like: [B, T, H]."""
    starts = torch.zeros_like(like[..., :1], dtype=torch.bool)
    starts[:, 0] = True
    if doc_ids is not None:
        starts[:, 1:] = (doc_ids[:, 1:] != doc_ids[:, :-1])[..., None]
    return starts


@torch.no_grad()
def stabiliser(log_f: Tensor, log_i: Tensor, before: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """m_t = max(log f_t + m_{t-1}, log i_t), with m_{t-1} = before [B, 1 or T, H] where `starts`; returns m_t and
    m_{t-1}.

    A scan by doubling: after a pass over windows of w tokens m_t is right for the last 2w of them. Only sums of
    log f inside a window are formed, so long sequences lose no precision (cumsum(log f) over all of them would).
    """
    m = torch.where(starts, torch.maximum(log_f + before, log_i), log_i)
    decay = log_f.masked_fill(starts, float("-inf"))
    width = 1
    while width < m.shape[1]:
        reaching = torch.maximum(m[:, width:], decay[:, width:] + m[:, :-width])
        m = torch.cat([m[:, :width], reaching], 1)
        decay = torch.cat([decay[:, :width], decay[:, width:] + decay[:, :-width]], 1)
        width *= 2
    shifted = torch.cat([before[:, :1], m[:, :-1]], 1)
    return m, torch.where(starts, before, shifted)


@torch.no_grad()
def entering_stabiliser(part: Slice, log_f: Tensor, log_i: Tensor, starts: Tensor, doc_ids: Tensor | None) -> Tensor:
    """m before every token that starts a document or the slice, [B, T, H]: 0, and at the first token the m that the
    slices before leave behind."""
    beyond = (0, 0, 0, log_f.shape[1] - 1)
    m, _ = stabiliser(log_f, log_i, F.pad(torch.full_like(log_f[:, :1], float("-inf")), beyond), starts)
    found, passing = cuts(part, doc_ids), log_f.sum(1)
    if found is not None:
        passing = passing.masked_fill(~found.spans[part.rank][:, None], float("-inf"))
    sent = part.stack_all(m[:, -1], passing)
    start, joins = torch.zeros_like(passing), None if found is None else found.joins
    entering = fold(part, sent, lambda e, m, f: torch.maximum(f + e, m), start, joins)
    return F.pad(entering[:, None], beyond)


@register(
    "mlstm",
    kind="mixer",
    paper="arXiv:2405.04517",
    ops=("linear_attention",),
    state_growth="constant",
    examples=(
        {"chunk_size": 16},
        {"num_heads": 2, "qk_dim_factor": 1.0, "v_dim_factor": 2.0, "gate_soft_cap": None, "chunk_size": 24},
    ),
)
class MatrixLSTM(Block):
    """mLSTM of xLSTM-7B: a matrix memory with an exponential input gate and a normaliser.

    C_t = f_t C_{t-1} + i_t k_t v_t^T, n_t = f_t n_{t-1} + i_t k_t,
    h_t = C_t^T q_t / max(|n_t . q_t|, 1), y = W_out (sigmoid(W_o x) * LayerNorm_head(h)), q scaled by Dk^-1/2.

    i = exp(cap(W_i x + b_i)), f = sigmoid(cap(W_f x + b_f)), one each per head, cap(z) = c tanh(z / c). An exponential
    gate overflows, so memory and normaliser are kept times exp(-m_t), m_t = max(log f_t + m_{t-1}, log i_t), m_0 = 0.
    In these units the layer is linear attention with log-decay log f_t + m_{t-1} - m_t <= 0 on values [v, 1] times
    exp(log i_t - m_t) <= 1: no exponent is positive, and every fast row of that op serves it. h does not depend on
    m but for the 1e-6 added to the denominator, so m has no gradient. Names and layout are those of transformers'
    xLSTM layer (weight_mode `single`); its initialisation, which also zeroes the output gate, is not repeated.
    x: [B, T, D] -> y: [B, T, D]; time O(T), state H (Dk Dv + Dk + 1) numbers.
    With i = f = 1 it is linear attention with the denominator max(|n . q|, 1).
    Useful: 4 H Dk (Dv + 1) FLOPs a token for memory and normaliser.
    """

    eps = 1e-6

    def __init__(
        self,
        dim: int,
        *,
        num_heads: PositiveInt | None = None,
        qk_dim_factor: PositiveFloat = 0.5,
        v_dim_factor: PositiveFloat = 1.0,
        gate_soft_cap: PositiveFloat | None = 15.0,
        norm_eps: PositiveFloat = 1e-6,
        chunk_size: PositiveInt = 64,
        kernel: str = "auto",
        device=None,
        dtype=None,
    ):
        super().__init__(dim)
        check_backend("linear_attention", kernel)
        heads = num_heads or default_heads(dim, 512)
        qk_dim, v_dim = int(dim * qk_dim_factor), int(dim * v_dim_factor)
        if qk_dim < heads or qk_dim % heads or v_dim < heads or v_dim % heads:
            raise ValueError(
                f"num_heads={heads} must divide qk_dim_factor * dim = {qk_dim} and v_dim_factor * dim = {v_dim}"
            )
        self.num_heads, self.key_dim, self.value_dim = heads, qk_dim // heads, v_dim // heads
        self.gate_soft_cap, self.chunk_size, self.kernel = gate_soft_cap, chunk_size, kernel
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.q = Linear(dim, qk_dim, bias=False, **factory)
        self.k = Linear(dim, qk_dim, bias=False, **factory)
        self.v = Linear(dim, v_dim, bias=False, **factory)
        self.ogate_preact = Linear(dim, v_dim, bias=False, **factory)
        self.igate_preact = Linear(dim, heads, bias=True, **factory)
        self.fgate_preact = Linear(dim, heads, bias=True, **factory)
        self.multihead_norm = HeadLayerNorm(v_dim, norm_eps, **factory)
        self.out_proj = Linear(v_dim, dim, bias=False, **factory)

    def projections(self) -> tuple[nn.Linear, ...]:
        """Every linear layer."""
        return self.q, self.k, self.v, self.ogate_preact, self.igate_preact, self.fgate_preact, self.out_proj

    @staticmethod
    def like_attention(dim: int, num_heads: int, num_kv_heads: int, head_dim: int) -> dict[str, Any]:
        """Queries, keys and values as wide as those of attention."""
        return dict.fromkeys(("qk_dim_factor", "v_dim_factor"), num_heads * head_dim / dim)

    @torch.no_grad()
    def from_attention(self, q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> tuple[str, ...]:
        """Take the maps of attention. Every token is written with weight 1; the output gate starts as 1/2, which the
        norm of the heads makes up for."""
        for linear in (self.igate_preact, self.fgate_preact, self.ogate_preact):
            linear.weight.zero_()
        self.igate_preact.bias.zero_()
        self.fgate_preact.bias.copy_(decay_logit(-1 / memories(self.num_heads, self.fgate_preact.bias)))
        if len(v) == len(self.multihead_norm.weight):
            self.multihead_norm.weight.copy_(2 * value_scale(v, len(v)))
        return take(
            ("q.weight", self.q.weight, q), ("k.weight", self.k.weight, k), ("v.weight", self.v.weight, v),
            ("out_proj.weight", self.out_proj.weight, o),
        )  # fmt: skip

    def reset_parameters(self) -> None:
        """The gates start constant: i = exp(-10), so that n . q is far below 1 and h small, and slow forgetting, a
        bias of 3 .. 6 over the heads."""
        for linear in (self.q, self.k, self.v, self.ogate_preact, self.out_proj):
            init_linear_(linear)
        for linear in (self.igate_preact, self.fgate_preact):
            nn.init.zeros_(linear.weight)
        nn.init.constant_(self.igate_preact.bias, -10.0)
        with torch.no_grad():
            bias = self.fgate_preact.bias
            bias.copy_(torch.linspace(3.0, 6.0, self.num_heads, device=bias.device))
        self.multihead_norm.reset_parameters()

    def forward(
        self,
        x: Tensor,
        *,
        state: MatrixLSTMState | None = None,
        positions: Tensor | None = None,
        doc_ids: Tensor | None = None,
    ) -> Tensor:
        refuse_packed_streaming(state, doc_ids)
        q, k = (p(x).unflatten(-1, (-1, self.key_dim)) for p in (self.q, self.k))
        v = wide(self.v(x).unflatten(-1, (-1, self.value_dim)))
        log_i = soft_cap(wide(self.igate_preact(x)), self.gate_soft_cap)
        log_f = F.logsigmoid(soft_cap(wide(self.fgate_preact(x)), self.gate_soft_cap))
        starts = document_starts(doc_ids, log_i)
        if (part := current()) is not None:
            before = entering_stabiliser(part, log_f, log_i, starts, doc_ids)
        else:
            before = torch.zeros_like(log_i[:, :1]) if state is None else previous(state.m)[:, None]
        m, m_before = stabiliser(log_f, log_i, before, starts)
        # log f + m_{t-1} - m_t, which rounding must not lift above 0
        log_decay = log_f + torch.minimum(m_before - m, -log_f.detach())
        h, memory = linear_attention(
            q,
            k,
            torch.cat([v, torch.ones_like(v[..., :1])], -1) * (log_i - m).exp()[..., None],
            log_decay,
            scale=self.key_dim**-0.5,
            initial_state=None if state is None else previous(state.memory),
            doc_ids=doc_ids,
            chunk_size=self.chunk_size,
            backend=self.kernel,
        )
        if state is not None:
            state.memory.copy_(handed_on(memory))
            state.m.copy_(m[:, -1])
        h = h[..., :-1] / (torch.maximum(h[..., -1:].abs(), (-m).exp()[..., None]) + self.eps)
        gate = wide(self.ogate_preact(x)).sigmoid()
        return self.out_proj((gate * self.multihead_norm(h)).to(x.dtype))

    def init_state(self, batch_size: int, max_len: int | None = None) -> MatrixLSTMState:
        like = self.q.weight
        shape = (batch_size, self.num_heads, self.key_dim, self.value_dim + 1)
        memory = like.new_zeros(shape, dtype=state_dtype(like.dtype))
        return MatrixLSTMState(memory, memory.new_zeros(shape[:2]))

    def state_bytes(self, batch_size: int, max_len: int) -> int:
        numbers = self.num_heads * (self.key_dim * (self.value_dim + 1) + 1)
        return batch_size * numbers * state_dtype(self.q.weight.dtype).itemsize

    def forward_flops(self, batch_size: int, seq_len: int, context_len: int = 0, streaming: bool = False) -> int:
        return linear_flops(batch_size * seq_len, *self.projections()) + linear_attention_flops(
            batch_size, seq_len, self.num_heads, self.key_dim, self.value_dim + 1, chunk_size=self.chunk_size
        )

    def useful_flops(self, batch_size: int, seq_len: int, context_len: int = 0) -> int:
        tokens = batch_size * seq_len
        state = work.recurrence(work.LINEAR, tokens, self.num_heads, self.key_dim, self.value_dim + 1)
        return linear_flops(tokens, *self.projections()) + state

    def vector_flops(self, batch_size: int, seq_len: int, context_len: int = 0) -> int:
        # decay of memory and normaliser; v times its gate; quotient, norm and output gate; the gates and m
        value = 1 + 1 + work.LAYER + work.SIGMOID + 1
        head = (self.key_dim + 1) * (self.value_dim + 1) + self.value_dim * value + 2 * work.SOFTCAP + 6
        return batch_size * seq_len * self.num_heads * head

    def activation_elements(self, batch_size: int, seq_len: int) -> int:
        # x; per head q and k; v with its 1, scaled, and what is read; the quotient, its norm twice, the gate, their
        # product; gates, decay, scales, denominator and statistics; a state for each interval
        row = 2 * self.key_dim + 8 * self.value_dim + (12 if self.gate_soft_cap is None else 14)
        states = -(-seq_len // INTERVAL) * self.key_dim * (self.value_dim + 1)
        return batch_size * (seq_len * (self.dim + self.num_heads * row) + self.num_heads * states)

    def parallel_plan(self) -> ParallelPlan:
        column = ("q", "k", "v", "ogate_preact", "igate_preact", "fgate_preact", "multihead_norm")
        return ParallelPlan(
            {**dict.fromkeys(column, "column"), "out_proj": "row"}, units=self.num_heads, context="pass_state"
        )
