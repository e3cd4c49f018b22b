"""pLSTM on a line: a linear recurrence with source, transition, mark and direct gates, whose transitions are small
matrices. Pöppel et al. 2025, arXiv:2506.11997."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.blocks.grafting import SMALL, memories, pass_through_, value_scale
from zoo.blocks.recurrent import default_heads, previous, wide
from zoo.contract import Block, ParallelPlan, State, init_linear_, linear_flops, refuse_packed_streaming, state_dtype
from zoo.kernels import work
from zoo.kernels.dispatch import check_backend
from zoo.kernels.linear import Linear
from zoo.kernels.linear_attention import INTERVAL
from zoo.kernels.plstm import flops as plstm_flops
from zoo.kernels.plstm import kept, plstm
from zoo.kernels.short_conv import short_conv
from zoo.registry import register
from zoo.schema import PositiveInt
from zoo.segments import handed_on


@dataclass
class ParallelLSTMState(State):
    """memory: [B, H, J, Dk, Dv]; conv: [B, W-1, D], the newest inputs."""

    memory: Tensor
    conv: Tensor


def rotation(x: Tensor) -> Tensor:
    """exp(A - A^T), an orthogonal matrix for each A [..., J, J]."""
    return torch.linalg.matrix_exp(x - x.mT)


@register(
    "plstm",
    kind="mixer",
    paper="arXiv:2506.11997",
    ops=("plstm", "short_conv"),
    state_growth="constant",
    relations=(
        "plstm(tracking_dim=1, conv_size=1) == linear_attention(feature_map='identity', normalize=False, "
        "output_norm=True) at source.bias=inf, mark.bias=inf, direct.bias=inf, eigenvalues.bias=inf, "
        "passthrough=0, conv.weight=1, conv.bias=0, q_proj.bias=0, k_proj.bias=0, v_proj.bias=0, "
        "mhnorm.weight=1, o_norm.weight=1",
    ),
    examples=(
        {"chunk_size": 16},
        {"num_heads": 2, "tracking_dim": 2, "conv_size": 2, "chunk_size": 8},
        {"tracking_dim": 1},
    ),
)
class ParallelLSTM(Block):
    """pLSTM in one dimension: a recurrence of matrices under source, transition, mark and direct gates.

    o_t = (M_t C_{t-1} q_t + D_t v_t (q_t . k_t)) / sqrt(Dk), C_t = T_t C_{t-1} + (S_t v_t) k_t^T: the past is read
    before the token is written.
    A head holds J = `tracking_dim` slots of Dk x Dv, a token brings J values of width Dv = Dk / J and reads J outputs.
    From c = conv(x): source S, mark M and direct D [J, J] are sigmoid(W c + b), b = -5; the transition is
    T = U diag(e) V, e = tanh(5 (w c + b)), b = 1, with rotations U = exp(A - A^T) and V likewise, A linear in c. So T
    has norm below 1 and may rotate, reflect and permute slots: a head can track the state of a finite group.
    q and k come from c, v from x; y = W_o RMSNorm_head(o) + p * c. With J = 1 the op runs on linear attention.
    As in the released layer, but for: projections are not separate for each head; the matrix exponential is exact,
    not a series of 16 terms; and gate weights start small, not at zero, where all slots have the same gradient.
    x: [B, T, D] -> y: [B, T, D]; time O(T), state D^2 / H numbers for any J, and W - 1 inputs.
    With all gates 1 and J = 1 the core is causal linear attention.
    Useful: (4 J + 2 J^2) Dk Dv FLOPs a head and token, or those of merged chunks, if they are less.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: PositiveInt | None = None,
        tracking_dim: PositiveInt = 4,
        conv_size: PositiveInt = 4,
        chunk_size: PositiveInt = 16,
        kernel: str = "auto",
        device=None,
        dtype=None,
    ):
        super().__init__(dim)
        check_backend("plstm", kernel)
        H, J = num_heads or default_heads(dim), tracking_dim
        if dim % (H * J):
            raise ValueError(f"num_heads={H} times tracking_dim={J} must divide dim = {dim}")
        self.num_heads, self.tracking_dim = H, J
        self.key_dim, self.value_dim = dim // H, dim // H // J
        self.chunk_size, self.kernel = chunk_size, kernel
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv = nn.Conv1d(dim, dim, conv_size, groups=dim, **factory)
        self.q_proj = Linear(dim, dim, **factory)
        self.k_proj = Linear(dim, dim, **factory)
        self.v_proj = Linear(dim, dim, **factory)
        self.source = Linear(dim, H * J * J, **factory)
        self.mark = Linear(dim, H * J * J, **factory)
        self.direct = Linear(dim, H * J * J, **factory)
        self.eigenvalues = Linear(dim, H * J, **factory)
        # a rotation of one slot is 1
        self.inproj = Linear(dim, H * J * J, **factory) if J > 1 else None
        self.outproj = Linear(dim, H * J * J, **factory) if J > 1 else None
        self.mhnorm = nn.RMSNorm(dim, eps=1e-5, **factory)  # its weight; the mean is taken over a head
        self.o_proj = Linear(dim, dim, bias=False, **factory)
        self.passthrough = nn.Parameter(torch.empty(dim, **factory))

    def gates(self) -> tuple[nn.Linear | None, ...]:
        """The maps to S, M, D and T."""
        return self.source, self.mark, self.direct, self.eigenvalues, self.inproj, self.outproj

    def projections(self) -> tuple[nn.Linear | None, ...]:
        """Every linear layer."""
        return self.q_proj, self.k_proj, self.v_proj, *self.gates(), self.o_proj

    def reset_parameters(self) -> None:
        """T starts near tanh(5) = 0.9999 times the identity: nothing is forgotten."""
        self.conv.reset_parameters()
        self.mhnorm.reset_parameters()
        for linear in self.projections():
            if linear is not None:
                init_linear_(linear, gain=0.1 if linear in self.gates() else 1.0)
        for linear in (self.source, self.mark, self.direct):
            nn.init.constant_(linear.bias, -5.0)
        nn.init.ones_(self.eigenvalues.bias)
        nn.init.ones_(self.passthrough)

    @staticmethod
    def like_attention(dim: int, num_heads: int, num_kv_heads: int, head_dim: int) -> dict[str, Any]:
        """A head of attention has one value a token."""
        return {"tracking_dim": 1}

    @torch.no_grad()
    def from_attention(self, q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> tuple[str, ...]:
        """Projections have the names of those of attention. Gates are open, memories differ from head to head, nothing
        passes by the heads."""
        for linear in self.gates():
            if linear is not None and self.tracking_dim == 1:  # of several slots, equal ones would never part
                linear.weight.zero_()
        for linear in (self.source, self.mark, self.direct):
            linear.bias.fill_(5.0)
        kept = (-1 / memories(self.num_heads, self.passthrough)).exp()
        self.eigenvalues.bias.copy_((kept.atanh() / 5).repeat_interleave(self.tracking_dim))
        for linear in (self.q_proj, self.k_proj, self.v_proj):
            linear.bias.zero_()
        pass_through_(self.conv, SMALL)
        self.passthrough.zero_()
        if len(v) == self.dim:
            self.mhnorm.weight.copy_(value_scale(v, self.dim))
        return ()

    def transitions(self, c: Tensor) -> Tensor:
        """T [B, T, H, J, J]."""
        J = self.tracking_dim
        sizes = torch.tanh(5 * wide(self.eigenvalues(c))).unflatten(-1, (-1, J))
        if self.inproj is None or self.outproj is None:
            return sizes[..., None]
        first, second = (rotation(wide(p(c)).unflatten(-1, (-1, J, J))) for p in (self.inproj, self.outproj))
        return (second * sizes[..., None, :]) @ first

    def forward(
        self,
        x: Tensor,
        *,
        state: ParallelLSTMState | None = None,
        positions: Tensor | None = None,
        doc_ids: Tensor | None = None,
    ) -> Tensor:
        refuse_packed_streaming(state, doc_ids)
        J = self.tracking_dim
        c, newest = short_conv(
            x, self.conv.weight[:, 0], self.conv.bias, state=None if state is None else state.conv, doc_ids=doc_ids
        )
        q, k = (p(c).unflatten(-1, (-1, self.key_dim)) for p in (self.q_proj, self.k_proj))
        v = wide(self.v_proj(x)).unflatten(-1, (-1, J, self.value_dim))  # wide: o is small until it is normed
        source, mark, direct = (
            wide(p(c)).sigmoid().unflatten(-1, (-1, J, J)) for p in (self.source, self.mark, self.direct)
        )
        o, memory = plstm(
            q,
            k,
            v,
            source,
            self.transitions(c),
            mark,
            direct,
            scale=self.key_dim**-0.5,
            initial_state=None if state is None else previous(state.memory),
            doc_ids=doc_ids,
            chunk_size=self.chunk_size,
            backend=self.kernel,
        )
        if state is not None:
            state.memory.copy_(handed_on(memory))
            state.conv.copy_(handed_on(newest))
        o = F.rms_norm(o.flatten(-2), (self.key_dim,), eps=self.mhnorm.eps).flatten(-2) * wide(self.mhnorm.weight)
        return self.o_proj(o.to(x.dtype)) + self.passthrough * c

    @property
    def carried(self) -> int:
        """Inputs that the convolution carries."""
        return self.conv.kernel_size[0] - 1

    def init_state(self, batch_size: int, max_len: int | None = None) -> ParallelLSTMState:
        like = self.q_proj.weight
        shape = (batch_size, self.num_heads, self.tracking_dim, self.key_dim, self.value_dim)
        return ParallelLSTMState(
            like.new_zeros(shape, dtype=state_dtype(like.dtype)), like.new_zeros(batch_size, self.carried, self.dim)
        )

    def state_bytes(self, batch_size: int, max_len: int) -> int:
        memory = self.dim * self.key_dim * state_dtype(self.q_proj.weight.dtype).itemsize
        return batch_size * (memory + self.carried * self.dim * self.itemsize)

    def forward_flops(self, batch_size: int, seq_len: int, context_len: int = 0, streaming: bool = False) -> int:
        tokens, J = batch_size * seq_len, self.tracking_dim
        core = plstm_flops(
            batch_size,
            seq_len,
            self.num_heads,
            self.key_dim,
            self.value_dim,
            slots=J,
            values=J,
            outputs=J,
            chunk_size=self.chunk_size,
            initial_state=streaming,
        )
        transitions = 2 * tokens * self.num_heads * J**3 if J > 1 else 0
        return linear_flops(tokens, *self.projections()) + transitions + core

    def useful_flops(self, batch_size: int, seq_len: int, context_len: int = 0) -> int:
        tokens, H, J = batch_size * seq_len, self.num_heads, self.tracking_dim
        transitions = 2 * tokens * H * J**3 if J > 1 else 0
        # each slot is written and read; transitions mix slots; source, mark and direct gates mix values
        state = (2 * J + (J * J if J > 1 else 0)) * self.key_dim * self.value_dim
        gates = (3 * J * J if J > 1 else 0) * self.value_dim + self.key_dim
        flops = linear_flops(tokens, *self.projections()) + transitions + 2 * tokens * H * (state + gates)
        # merging chunks can take less than moving every slot at every token
        return min(flops, self.forward_flops(batch_size, seq_len, context_len, context_len > 0))

    def vector_flops(self, batch_size: int, seq_len: int, context_len: int = 0) -> int:
        H, J = self.num_heads, self.tracking_dim
        gates = H * (3 * J * J * work.SIGMOID + J)
        decay = H * self.key_dim * self.value_dim if J == 1 else 0
        conv = 2 * self.conv.kernel_size[0]
        return batch_size * seq_len * (self.dim * (conv + work.RMS + 2) + gates + decay)

    def activation_elements(self, batch_size: int, seq_len: int) -> int:
        # x, its convolution; rotations and their signs, gates; o and its norm twice; what a chunk forms
        J, H = self.tracking_dim, self.num_heads
        token = 5 * self.dim + H * (8 * J * J + J + 1)
        if J > 1:
            form = kept(seq_len, self.key_dim, self.value_dim, slots=J, chunk_size=self.chunk_size)
            return batch_size * (seq_len * token + H * form)
        # q, k and v as they are and as linear attention reads them; its gates, and a state for each interval
        token += 6 * self.dim + 2 * H
        return batch_size * (seq_len * token + -(-seq_len // INTERVAL) * self.dim * self.key_dim)

    def parallel_plan(self) -> ParallelPlan:
        gates = ("source", "mark", "direct", "eigenvalues", "inproj", "outproj")
        column = dict.fromkeys(("q_proj", "k_proj", "v_proj", *gates, "mhnorm"), "column")
        whole = {"conv": "replicate", "passthrough": "once"}
        return ParallelPlan({**column, "o_proj": "row", **whole}, units=self.num_heads, context="pass_state")
