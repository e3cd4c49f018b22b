"""S4D, the diagonal state space model: one time-invariant convolution a channel, kept as a recurrence.
Gu et al. 2022, arXiv:2206.11893.

With N/2 pairs of complex conjugates a channel, A = -exp(log_A_real) + i A_imag, delta = exp(log_dt):
    h_t = exp(delta A) h_{t-1} + x_t,  y_t = 2 Re sum_n C_n (exp(delta A_n) - 1) / A_n h_tn + D x_t   (zero-order hold)
    output = GLU(gelu(y))
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.blocks.grafting import SMALL, memories
from zoo.blocks.recurrent import previous, wide
from zoo.contract import Block, ParallelPlan, State, init_linear_, linear_flops, refuse_packed_streaming, state_dtype
from zoo.kernels import work
from zoo.kernels.diagonal_scan import diagonal_scan
from zoo.kernels.dispatch import check_backend
from zoo.kernels.linear import Linear
from zoo.kernels.precision import no_autocast
from zoo.registry import register
from zoo.row import current, delayed
from zoo.schema import PositiveInt
from zoo.segments import handed_on


@dataclass
class S4DState(State):
    """h: [B, D, N/2, 2], real and imaginary parts of the state after the last token."""

    h: Tensor


def _stacked(z: Tensor) -> Tensor:
    """Complex [D, M, L] as real [D, 2 M, L]."""
    return torch.cat([z.real, z.imag], 1)


@register(
    "s4d",
    kind="mixer",
    paper="arXiv:2206.11893",
    ops=("diagonal_scan",),
    state_growth="constant",
    relations=("s4d(chunk_size=16) == s4d(chunk_size=128)",),  # the convolution is the scan
    examples=(
        {"chunk_size": 16},
        {"init": "inv", "state_dim": 8, "chunk_size": 8},
        {"init": "real", "state_dim": 4},
    ),
)
class S4D(Block):
    """Diagonal state space model: h_t = exp(delta A) h_{t-1} + x_t, y = GLU(gelu(2 Re(C' h) + D * x)) per channel.

    init: A_n = -1/2 + i pi n (`lin`), -1/2 + i (N/pi) (N/(2n+1) - 1) (`inv`) or -(n+1) (`real`); the steps delta
    start log-uniform in [1e-3, 1e-1]. The GLU: W_1 u * sigmoid(W_2 u) with a bias, [W_1; W_2] = out_proj.
    x: [B, T, D] -> y: [B, T, D]; 2 D^2 + 2 D N and some vectors; O(T) time, D N numbers of state. Whole chunks are
    products with the convolution's kernel (C_h + 2 N multiply-adds a number, C_h = chunk_size), the rest and packed
    documents a scan, which keeps N numbers of every channel and token.
    Doubled delta is the same system sampled half as often; with C = 0 the layer acts on each token alone.
    Parameters cast to bf16 are another system: phases grow with time.
    Useful: 2 D N FLOPs a token to read the states, and 4 D N operations to make them.
    """

    not_decayed = ("log_A_real", "A_imag")

    def __init__(
        self,
        dim: int,
        *,
        state_dim: PositiveInt = 64,
        init: Literal["lin", "inv", "real"] = "lin",
        chunk_size: PositiveInt = 32,
        kernel: str = "auto",
        device=None,
        dtype=None,
    ):
        super().__init__(dim)
        check_backend("diagonal_scan", kernel)
        if state_dim % 2:
            raise ValueError(f"state_dim={state_dim} must be even: states are pairs of complex conjugates")
        self.pairs, self.init, self.chunk_size, self.kernel = state_dim // 2, init, chunk_size, kernel
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.log_dt, self.D = (nn.Parameter(torch.empty(dim, **factory)) for _ in range(2))
        self.log_A_real, self.A_imag = (nn.Parameter(torch.empty(dim, self.pairs, **factory)) for _ in range(2))
        self.C = nn.Parameter(torch.empty(dim, self.pairs, 2, **factory))
        self.out_proj = Linear(dim, 2 * dim, **factory)

    @torch.no_grad()
    def from_attention(self, q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> tuple[str, ...]:
        """Every channel is a decaying mean of x, read small, where GELU is linear, and the first half of out_proj is
        what values and output of attention make of a mean together; queries and keys have no counterpart."""
        tokens = memories(self.dim, self.C) * wide(self.log_dt).exp()
        self.log_A_real[:, 0] = -tokens.log()
        self.A_imag[:, 0] = 0
        self.C.zero_()[:, 0, 0] = SMALL / (2 * tokens)
        self.D.zero_()
        self.out_proj.weight.zero_()[: self.dim] = 4 / SMALL * (wide(o) @ wide(v))  # GELU and GLU halve it
        self.out_proj.bias.zero_()
        return ("out_proj.weight",)

    def reset_parameters(self) -> None:
        n = torch.arange(self.pairs, device=self.C.device, dtype=torch.float64)
        N = 2 * self.pairs
        imag = {"lin": math.pi * n, "inv": N / math.pi * (N / (2 * n + 1) - 1), "real": 0 * n}[self.init]
        with torch.no_grad():
            self.log_A_real.copy_(torch.log(n + 1) if self.init == "real" else torch.full_like(n, math.log(0.5)))
            self.A_imag.copy_(imag)
        nn.init.uniform_(self.log_dt, math.log(1e-3), math.log(1e-1))
        nn.init.normal_(self.C, std=0.5**0.5)
        nn.init.normal_(self.D)
        init_linear_(self.out_proj)

    def discretised(self) -> tuple[Tensor, Tensor]:
        """delta A and 2 C (exp(delta A) - 1) / A, complex [D, N/2]."""
        A = torch.complex(-wide(self.log_A_real).exp(), wide(self.A_imag))
        log_decay = wide(self.log_dt).exp()[:, None] * A
        return log_decay, 2 * torch.view_as_complex(wide(self.C)) * torch.expm1(log_decay) / A

    def forward(
        self,
        x: Tensor,
        *,
        state: S4DState | None = None,
        positions: Tensor | None = None,
        doc_ids: Tensor | None = None,
    ) -> Tensor:
        refuse_packed_streaming(state, doc_ids)
        T = x.shape[1]
        whole = T - T % self.chunk_size if doc_ids is None else 0
        if current() is not None and whole < T:
            whole = 0  # what is left over lies before the chunks of the next slice
        h = None if state is None else torch.view_as_complex(previous(state.h))
        system, parts = self.discretised(), []
        if whole:
            with no_autocast(x.device):
                y, h = self._chunks(*system, wide(x[:, :whole]), h)
            parts.append(y)
        if whole < T:
            y, h = self._scan(*system, wide(x[:, whole:]), h, doc_ids)
            parts.append(y)
        if state is not None and h is not None:
            state.h.copy_(torch.view_as_real(handed_on(h)))
        y = torch.cat(parts, 1).to(x.dtype) + self.D * x
        return F.glu(self.out_proj(F.gelu(y)))

    def _scan(
        self, log_decay: Tensor, C: Tensor, x: Tensor, h: Tensor | None, doc_ids: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """y and the last state, token by token."""
        inputs = x[..., None].expand(*x.shape, self.pairs).to(log_decay.dtype)
        h, last = diagonal_scan(log_decay, inputs, initial_state=h, doc_ids=doc_ids, backend=self.kernel)
        return (C * h).sum(-1).real, last

    def _chunks(self, log_decay: Tensor, C: Tensor, x: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
        """y and the last state; T is a multiple of the chunk size L."""
        B, L = x.shape[0], self.chunk_size
        powers = torch.exp(log_decay[..., None] * torch.arange(L + 1, device=x.device))  # [D, N/2, L + 1]
        read = C[..., None] * powers
        columns = x.unflatten(1, (-1, L)).permute(3, 2, 0, 1).flatten(2)  # [D, L, B chunks]
        # inside a chunk: the Toeplitz matrix of the kernel, row i being K_i .. K_0, 0 ..
        kernel = read[..., :L].sum(1).real
        toeplitz = F.pad(kernel.flip(1), (0, L - 1)).unfold(1, L, 1).flip(1)
        y = torch.bmm(toeplitz, columns)
        # from chunk to chunk: what each one adds to the state at its end, and what the state before it gives
        added = torch.bmm(_stacked(powers[..., :L].flip(2)), columns)
        added = torch.complex(*added.chunk(2, 1)).unflatten(2, (B, -1)).permute(2, 3, 0, 1)  # [B, chunks, D, N/2]
        states, last = diagonal_scan(L * log_decay, added, initial_state=h, backend=self.kernel)
        before = delayed(states, h).permute(2, 3, 0, 1).flatten(2)
        y = torch.baddbmm(y, _stacked(read[..., 1:].conj()).mT, _stacked(before))
        return y.unflatten(2, (B, -1)).permute(2, 3, 1, 0).flatten(1, 2), last

    def init_state(self, batch_size: int, max_len: int | None = None) -> S4DState:
        like = self.C
        return S4DState(like.new_zeros(batch_size, *like.shape, dtype=state_dtype(like.dtype)))

    def state_bytes(self, batch_size: int, max_len: int) -> int:
        return batch_size * self.C.numel() * state_dtype(self.C.dtype).itemsize

    def forward_flops(self, batch_size: int, seq_len: int, context_len: int = 0, streaming: bool = False) -> int:
        whole = seq_len - seq_len % self.chunk_size
        per_number = 2 * self.chunk_size + 8 * self.pairs  # kernel; into and out of the state
        return batch_size * whole * self.dim * per_number + linear_flops(batch_size * seq_len, self.out_proj)

    def useful_flops(self, batch_size: int, seq_len: int, context_len: int = 0) -> int:
        # the recurrence, of which only reading is a product
        return 4 * batch_size * seq_len * self.dim * self.pairs + linear_flops(batch_size * seq_len, self.out_proj)

    def vector_flops(self, batch_size: int, seq_len: int, context_len: int = 0) -> int:
        # the complex update; D x, gelu, the gated half
        return batch_size * seq_len * self.dim * (8 * self.pairs + 2 + work.GELU + work.SIGMOID + 1)

    def activation_elements(self, batch_size: int, seq_len: int) -> int:
        # a token: x, y + D x, its gelu, both halves. A chunk: its columns; two states complex, what it adds, the state
        # before it; the system: powers of the decay, what products read of them, the Toeplitz matrix
        B, P, L = batch_size, 2 * self.pairs, self.chunk_size
        chunks, rest = divmod(seq_len, L)
        kept = B * 5 * seq_len + 6 * P
        if chunks:
            kept += B * chunks * (L + 4 * P) + P * (3 * L + 2) + L * L
        if rest:  # token by token: the decay and the state of each, and the one that the chunks left
            kept += 2 * B * rest * P + P + (B * P if chunks else 0)
        return self.dim * kept

    def parallel_plan(self) -> ParallelPlan:
        return ParallelPlan(
            context="pass_state", reason="channels are alone until out_proj, whose rows stack the halves of a GLU"
        )
