"""The layer behind `linear_attention`, `gla` and `retention`: linear attention between projections. No block."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.blocks.grafting import value_scale
from zoo.blocks.recurrent import GatedHeadNorm, LinearState, previous
from zoo.contract import Block, ParallelPlan, State, init_linear_, linear_flops, refuse_packed_streaming, state_dtype
from zoo.kernels import work
from zoo.kernels.dispatch import check_backend
from zoo.kernels.linear import Linear
from zoo.kernels.linear_attention import INTERVAL, linear_attention
from zoo.kernels.linear_attention import flops as linear_attention_flops
from zoo.segments import handed_on


class LinearMixer(Block):
    """y = W_o (norm(o) * silu(W_g x)), o = linear_attention(W_q x, W_k x, W_v x, decay), norm and gate optional.

    A subclass says what happens to q and k, and what the decay is.
    Useful: 4 Dk Dv FLOPs a head and token, one update and one reading of the state.
    """

    decay_kind: Literal["none", "head", "channel"] = "none"
    value_extra = 0  # columns of the memory beyond the value

    def __init__(
        self,
        dim: int,
        num_heads: int,
        key_dim: int,
        value_dim: int,
        *,
        output_norm: bool,
        output_gate: bool,
        chunk_size: int,
        kernel: str,
        device=None,
        dtype=None,
    ):
        super().__init__(dim)
        check_backend("linear_attention", kernel)
        self.num_heads, self.key_dim, self.value_dim = num_heads, key_dim, value_dim
        self.chunk_size, self.kernel = chunk_size, kernel
        self.scale = key_dim**-0.5
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.q_proj = Linear(dim, num_heads * key_dim, bias=False, **factory)
        self.k_proj = Linear(dim, num_heads * key_dim, bias=False, **factory)
        self.v_proj = Linear(dim, num_heads * value_dim, bias=False, **factory)
        self.g_proj = Linear(dim, num_heads * value_dim, bias=False, **factory) if output_gate else None
        self.o_norm = GatedHeadNorm(value_dim, **factory) if output_norm else None
        self.o_proj = Linear(num_heads * value_dim, dim, bias=False, **factory)

    @property
    def memory_dim(self) -> int:
        """Rows of a head's memory: the width of what `features` returns."""
        return self.key_dim

    def projections(self) -> tuple[nn.Linear | None, ...]:
        """Every linear layer."""
        return self.q_proj, self.k_proj, self.v_proj, self.g_proj, self.o_proj

    def reset_parameters(self) -> None:
        for linear in self.projections():
            if linear is not None:
                init_linear_(linear)
        if self.o_norm is not None:
            self.o_norm.reset_parameters()

    @staticmethod
    def like_attention(dim: int, num_heads: int, num_kv_heads: int, head_dim: int) -> dict[str, Any]:
        """Attention has no gate at its output."""
        return {"output_gate": False}

    @torch.no_grad()
    def from_attention(self, q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> tuple[str, ...]:
        """Projections have the names of those of attention. The norm gives back the size of the values, of which
        attention reads a mean."""
        if self.o_norm is not None and len(v) == self.num_heads * self.value_dim:
            self.o_norm.weight.copy_(value_scale(v, self.num_heads))
        self.start_decay_()
        return ()

    def start_decay_(self) -> None:
        """Set trained decays to where memories differ from head to head or channel to channel."""

    def log_decay(self, x: Tensor) -> Tensor | None:
        """Log-decay in a shape that the op takes."""
        return None

    def features(
        self, q: Tensor, k: Tensor, state: Any, positions: Tensor | None, doc_ids: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """What the op sees of q and k [B, T, H, Dk]: [B, T, H, memory_dim]."""
        return q, k

    def values(self, v: Tensor) -> Tensor:
        """What the op sees of v [B, T, H, Dv]."""
        return v

    def read_out(self, o: Tensor) -> Tensor:
        """[B, T, H, Dv] of what the op returned."""
        return o

    def forward(
        self,
        x: Tensor,
        *,
        state: LinearState | None = None,
        positions: Tensor | None = None,
        doc_ids: Tensor | None = None,
    ) -> Tensor:
        refuse_packed_streaming(state, doc_ids)
        q, k = (p(x).unflatten(-1, (-1, self.key_dim)) for p in (self.q_proj, self.k_proj))
        v = self.v_proj(x).unflatten(-1, (-1, self.value_dim))
        q, k = self.features(q, k, state, positions, doc_ids)
        o, memory = linear_attention(
            q,
            k,
            self.values(v),
            self.log_decay(x),
            scale=self.scale,
            initial_state=None if state is None else previous(state.memory),
            doc_ids=doc_ids,
            chunk_size=self.chunk_size,
            backend=self.kernel,
        )
        if state is not None:
            state.memory.copy_(handed_on(memory))
        o = self.read_out(o).to(x.dtype)
        gate = None if self.g_proj is None else self.g_proj(x)
        if self.o_norm is not None:
            return self.o_proj(self.o_norm(o, gate))
        o = o.flatten(-2)
        return self.o_proj(o if gate is None else o * F.silu(gate))

    def init_state(self, batch_size: int, max_len: int | None = None) -> State:
        return LinearState(self.new_memory(batch_size))

    def new_memory(self, batch_size: int) -> Tensor:
        """Zeros [B, H, Dk, Dv] in the dtype of states."""
        like = self.q_proj.weight
        shape = (batch_size, self.num_heads, self.memory_dim, self.value_dim + self.value_extra)
        return like.new_zeros(shape, dtype=state_dtype(like.dtype))

    def state_bytes(self, batch_size: int, max_len: int) -> int:
        itemsize = state_dtype(self.q_proj.weight.dtype).itemsize
        return batch_size * self.num_heads * self.memory_dim * (self.value_dim + self.value_extra) * itemsize

    def forward_flops(self, batch_size: int, seq_len: int, context_len: int = 0, streaming: bool = False) -> int:
        return linear_flops(batch_size * seq_len, *self.projections()) + linear_attention_flops(
            batch_size,
            seq_len,
            self.num_heads,
            self.memory_dim,
            self.value_dim + self.value_extra,
            chunk_size=self.chunk_size,
            decay=self.decay_kind,
        )

    def useful_flops(self, batch_size: int, seq_len: int, context_len: int = 0) -> int:
        tokens, width = batch_size * seq_len, self.value_dim + self.value_extra
        state = work.recurrence(work.LINEAR, tokens, self.num_heads, self.memory_dim, width)
        return linear_flops(tokens, *self.projections()) + state

    def vector_flops(self, batch_size: int, seq_len: int, context_len: int = 0) -> int:
        decay = 0 if self.decay_kind == "none" else self.memory_dim * (self.value_dim + self.value_extra)
        value = self.value_extra  # what is divided by it
        value += 0 if self.o_norm is None else work.RMS
        value += 0 if self.g_proj is None else work.SILU + 1
        head = decay + self.value_dim * value + self.key_work
        return batch_size * seq_len * self.num_heads * head

    @property
    def key_work(self) -> int:
        """Operations outside matrix products that a head makes its features and its decay with, a token."""
        return 0

    def activation_elements(self, batch_size: int, seq_len: int) -> int:
        # x; q, k, v as the op reads them and what they are made of; o, of a quotient both parts; its norm or gate, and
        # what W_o reads; a state for each interval
        rows, value = batch_size * seq_len * self.num_heads, self.value_dim + self.value_extra
        kept = batch_size * seq_len * (self.dim + self.token_elements())
        kept += rows * (2 * self.memory_dim + value + (value + 1 if self.value_extra else 0))
        if self.o_norm is not None:
            kept += self.o_norm.activation_elements(rows, self.g_proj is not None) + rows * self.value_dim
        else:
            kept += rows * self.value_dim * (1 if self.g_proj is None else 4)
        states = -(-seq_len // INTERVAL) * self.num_heads * self.memory_dim * value
        return kept + batch_size * states

    def token_elements(self) -> int:
        """Elements of a token kept for `features` and `log_decay`, q and k as the op reads them left out."""
        return 0

    def parallel_plan(self) -> ParallelPlan:
        column = {name: "column" for name in ("q_proj", "k_proj", "v_proj", "g_proj")}
        return ParallelPlan(
            column | {"o_norm": "replicate", "o_proj": "row"}, units=self.num_heads, context="pass_state"
        )
