"""The layer behind `kda` and `deltanet`: the delta rule between projections. No block."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.blocks.gated_deltanet import ConvLinearState
from zoo.blocks.grafting import inverse_softplus, memories, value_scale
from zoo.blocks.recurrent import (
    GatedHeadNorm,
    l2_normalise,
    previous,
    reset_softplus_decay_,
    silu_conv,
    softplus_decay,
    wide,
)
from zoo.contract import Block, State, init_linear_, linear_flops, refuse_packed_streaming, state_dtype
from zoo.kernels import work
from zoo.kernels.delta_rule import delta_rule
from zoo.kernels.delta_rule import flops as delta_rule_flops
from zoo.kernels.dispatch import check_backend
from zoo.kernels.linear import Linear
from zoo.segments import handed_on


class DeltaMixer(Block):
    """y = W_o (RMSNorm_head(o) * act(gate)), o = delta_rule(q, k, v, beta, decay) with q, k, v = silu(conv(W x)),
    q and k of unit length, beta = sigmoid(W_b x), twice that with `allow_neg_eigval`; `updates` keys, values and
    betas a token.

    decay 'head' is that of Gated DeltaNet. A subclass says where the weights of the convolution lie, what the gate is
    and, with decay 'channel', what the decay is.
    """

    interval = 32

    def __init__(
        self,
        dim: int,
        num_heads: int,
        key_dim: int,
        value_dim: int,
        *,
        updates: int = 1,
        decay: Literal["channel", "head", "none"],
        conv_size: int,
        gate_activation: Literal["silu", "sigmoid"],
        allow_neg_eigval: bool,
        norm_eps: float,
        chunk_size: int,
        kernel: str,
        device=None,
        dtype=None,
    ):
        super().__init__(dim)
        check_backend("delta_rule", kernel)
        self.num_heads, self.key_dim, self.value_dim, self.updates = num_heads, key_dim, value_dim, updates
        self.decay, self.conv_size, self.allow_neg_eigval = decay, conv_size, allow_neg_eigval
        self.chunk_size, self.kernel, self.output_gate = chunk_size, kernel, False
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.widths = [num_heads * key_dim, updates * num_heads * key_dim, updates * num_heads * value_dim]
        self.q_proj, self.k_proj, self.v_proj = (Linear(dim, width, bias=False, **factory) for width in self.widths)
        self.b_proj = Linear(dim, updates * num_heads, bias=False, **factory)
        if decay == "head":
            self.a_proj = Linear(dim, num_heads, bias=False, **factory)
            self.A_log = nn.Parameter(torch.empty(num_heads, **factory))
            self.dt_bias = nn.Parameter(torch.empty(num_heads, **factory))
        self.o_norm = GatedHeadNorm(value_dim, activation=gate_activation, eps=norm_eps, **factory)
        self.o_proj = Linear(num_heads * value_dim, dim, bias=False, **factory)

    def projections(self) -> list[nn.Linear]:
        """Every linear layer."""
        return [m for m in self.modules() if isinstance(m, nn.Linear)]

    def reset_parameters(self) -> None:
        for linear in self.projections():
            init_linear_(linear)
        self.o_norm.reset_parameters()
        if self.decay == "head":
            reset_softplus_decay_(self.A_log, self.dt_bias, 0.0, 16.0)

    @staticmethod
    def like_attention(dim: int, num_heads: int, num_kv_heads: int, head_dim: int) -> dict[str, Any]:
        """Attention has no gate at its output."""
        return {"output_gate": False}

    @torch.no_grad()
    def from_attention(self, q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> tuple[str, ...]:
        """Projections have the names of those of attention. Every update is half of a correction."""
        if len(v) == self.num_heads * self.value_dim:
            self.o_norm.weight.copy_(value_scale(v, self.num_heads))
        self.b_proj.weight.zero_()
        self.start_convolutions_()
        if self.decay == "head":
            self.a_proj.weight.zero_()
            self.A_log.zero_()
            self.dt_bias.copy_(inverse_softplus(1 / memories(self.num_heads, self.dt_bias)))
        return ()

    def start_convolutions_(self) -> None:
        """Have the convolutions let a token through, small: SiLU is linear there, and all that follows is normed."""
        raise NotImplementedError

    def conv_weight(self) -> Tensor:
        """Weight [C, 1, W] over the channels of q, k and v, where conv_size is not 0."""
        raise NotImplementedError

    def log_decay(self, x: Tensor) -> Tensor | None:
        """Log-decay in a shape that the op takes."""
        return softplus_decay(self.a_proj(x), self.A_log, self.dt_bias) if self.decay == "head" else None

    def gate(self, x: Tensor) -> Tensor | None:
        """What the output is gated with [B, T, H Dv], before its activation."""
        return None

    def mix(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        log_decay: Tensor | None,
        memory: Tensor | None,
        doc_ids: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The op: outputs [B, T, H, Dv] and the memory after them."""
        return delta_rule(
            q,
            k,
            v,
            beta,
            log_decay,
            scale=self.key_dim**-0.5,
            initial_state=memory,
            doc_ids=doc_ids,
            chunk_size=self.chunk_size,
            backend=self.kernel,
        )

    def forward(
        self,
        x: Tensor,
        *,
        state: ConvLinearState | None = None,
        positions: Tensor | None = None,
        doc_ids: Tensor | None = None,
    ) -> Tensor:
        refuse_packed_streaming(state, doc_ids)
        parts = [self.q_proj(x), self.k_proj(x), self.v_proj(x)]
        qkv = torch.cat(parts, -1)
        if self.conv_size:
            carried = None if state is None else state.conv
            qkv = silu_conv(qkv, self.conv_weight(), None, carried, doc_ids, "auto")
        else:
            qkv = F.silu(qkv)
        q, k, v = qkv.split([part.shape[-1] for part in parts], -1)
        q, k = (l2_normalise(wide(t).unflatten(-1, (-1, self.key_dim))) for t in (q, k))
        v = v.unflatten(-1, (-1, self.value_dim))
        beta = wide(self.b_proj(x)).sigmoid() * (2 if self.allow_neg_eigval else 1)
        memory = None if state is None else previous(state.memory)
        o, memory = self.mix(q, k, v, beta, self.log_decay(x), memory, doc_ids)
        if state is not None:
            state.memory.copy_(handed_on(memory))
        return self.o_proj(self.o_norm(o, self.gate(x)))

    def init_state(self, batch_size: int, max_len: int | None = None) -> State:
        like = self.q_proj.weight
        shape = (batch_size, self.num_heads, self.key_dim, self.value_dim)
        return ConvLinearState(
            like.new_zeros(shape, dtype=state_dtype(like.dtype)),
            like.new_zeros(batch_size, max(self.conv_size - 1, 0), sum(self.widths)),
        )

    def state_bytes(self, batch_size: int, max_len: int) -> int:
        memory = self.num_heads * self.key_dim * self.value_dim * state_dtype(self.q_proj.weight.dtype).itemsize
        return batch_size * (memory + max(self.conv_size - 1, 0) * sum(self.widths) * self.itemsize)

    def forward_flops(self, batch_size: int, seq_len: int, context_len: int = 0, streaming: bool = False) -> int:
        return linear_flops(batch_size * seq_len, *self.projections()) + delta_rule_flops(
            batch_size,
            self.updates * seq_len,
            self.num_heads,
            self.key_dim,
            self.value_dim,
            chunk_size=self.chunk_size,
            channel_decay=self.decay == "channel",
        )

    def useful_flops(self, batch_size: int, seq_len: int, context_len: int = 0) -> int:
        tokens, products = batch_size * seq_len, 2 * self.updates + 1  # updates are read and written, q reads once
        state = work.recurrence(products, tokens, self.num_heads, self.key_dim, self.value_dim)
        return linear_flops(tokens, *self.projections()) + state

    def vector_flops(self, batch_size: int, seq_len: int, context_len: int = 0) -> int:
        conv = (2 * self.conv_size + work.SILU) * sum(self.widths)
        unit = work.UNIT * sum(self.widths[:2])
        decays = {"none": 0, "head": 1, "channel": self.key_dim}[self.decay]
        # decay of the state; softplus, times A, exponential; norm; beta (v - S k) and beta of each update
        head = (decays > 0) * self.key_dim * self.value_dim + 3 * decays + work.RMS * self.value_dim
        head += self.updates * (2 * self.value_dim + work.SIGMOID + self.allow_neg_eigval)
        return batch_size * seq_len * (conv + unit + self.num_heads * head)

    def activation_elements(self, batch_size: int, seq_len: int) -> int:
        # x; q, k, v side by side, convolved, and as the op reads them; lengths of q and k, sigmoid and beta; the decay
        # and what it is made of; o, its norm and gate, what W_o reads; a state every 32 updates
        H, n, tokens = self.num_heads, self.updates, batch_size * seq_len
        token = self.dim + 3 * sum(self.widths) + (n - 1) * self.widths[0] + H * (1 + 3 * n)
        if self.decay != "none":
            token += (2 + n) * H * (self.key_dim if self.decay == "channel" else 1)
        token += n * H * self.value_dim  # of n outputs the last one's norm keeps all
        norm = self.o_norm.activation_elements(tokens * H, self.output_gate)
        states = batch_size * -(-n * seq_len // 32) * H * self.key_dim * self.value_dim
        return tokens * token + norm + states
