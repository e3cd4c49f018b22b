"""The linear recurrent unit: a complex diagonal recurrence whose eigenvalues start in a ring of the unit disk.
Orvieto et al. 2023, arXiv:2303.06349."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.blocks.grafting import SMALL, memories, take
from zoo.blocks.recurrent import previous, wide
from zoo.contract import Block, ParallelPlan, State, init_linear_, linear_flops, refuse_packed_streaming, state_dtype
from zoo.kernels import work
from zoo.kernels.diagonal_scan import diagonal_scan
from zoo.kernels.dispatch import check_backend
from zoo.kernels.linear import Linear, linear
from zoo.registry import register
from zoo.schema import PositiveFloat, PositiveInt, Range
from zoo.segments import handed_on


@dataclass
class LRUState(State):
    """h: [B, N, 2], real and imaginary part of the state after the last token."""

    h: Tensor


@register(
    "lru",
    kind="mixer",
    paper="arXiv:2303.06349",
    ops=("diagonal_scan",),
    state_growth="constant",
    examples=({}, {"state_dim": 24, "r_min": 0.0, "r_max": 0.9, "max_phase": 0.5}),
)
class LRU(Block):
    """Linear recurrent unit: h_t = lambda * h_{t-1} + exp(gamma) * B x_t, y = GLU(gelu(Re(C h) + D * x)).

    lambda = exp(-exp(nu) + i exp(theta)), N = `state_dim` complex numbers inside the unit circle; B, C complex.
    At the start lambda is uniform on the ring r_min <= |lambda| <= r_max with phases up to max_phase, and
    exp(gamma) = sqrt(1 - |lambda|^2). The GLU: W_1 u * sigmoid(W_2 u) with a bias, [W_1; W_2] = out_proj.
    x: [B, T, D] -> y: [B, T, D]; 4 D N + 2 D^2 parameters and some vectors, O(T) time, 2 N numbers of state.
    Useful: 8 D N + 4 D^2 FLOPs a token, of its maps, and 10 N operations for the state.
    Time-invariant: between B and C it is a convolution; with theta = -inf one real decay a channel. Parameters
    cast to bf16 are another system: phases grow with time.
    """

    def __init__(
        self,
        dim: int,
        *,
        state_dim: PositiveInt | None = None,
        r_min: Annotated[float, Range(ge=0, lt=1)] = 0.9,
        r_max: Annotated[float, Range(gt=0, lt=1)] = 0.999,
        max_phase: PositiveFloat = 2 * math.pi,
        kernel: str = "auto",
        device=None,
        dtype=None,
    ):
        super().__init__(dim)
        check_backend("diagonal_scan", kernel)
        if r_min >= r_max:
            raise ValueError(f"r_min={r_min} must be below r_max={r_max}: eigenvalues start in the ring between them")
        self.state_dim, self.kernel = state_dim or dim, kernel
        self.r_min, self.r_max, self.max_phase = r_min, r_max, max_phase
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        N = self.state_dim
        self.nu_log, self.theta_log, self.gamma_log = (nn.Parameter(torch.empty(N, **factory)) for _ in range(3))
        self.B_re, self.B_im = (nn.Parameter(torch.empty(N, dim, **factory)) for _ in range(2))
        self.C_re, self.C_im = (nn.Parameter(torch.empty(dim, N, **factory)) for _ in range(2))
        self.D = nn.Parameter(torch.empty(dim, **factory))
        self.out_proj = Linear(dim, 2 * dim, **factory)

    @staticmethod
    def like_attention(dim: int, num_heads: int, num_kv_heads: int, head_dim: int) -> dict[str, Any]:
        """A state for each channel of the values."""
        return {"state_dim": num_heads * head_dim}

    @torch.no_grad()
    def from_attention(self, q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> tuple[str, ...]:
        """States are decaying means of the values, read by the output of attention, small, where GELU is linear;
        queries and keys have no counterpart."""
        if len(v) != self.state_dim:
            return ()
        rate = 1 / memories(self.state_dim, self.nu_log)
        self.nu_log.copy_(rate.log())
        self.theta_log.fill_(-10.0)
        self.gamma_log.copy_(torch.log(-torch.expm1(-rate)))
        for imaginary in (self.B_im, self.C_im, self.D):
            imaginary.zero_()
        self.out_proj.weight.zero_()[: self.dim].fill_diagonal_(4 / SMALL)  # GELU and GLU halve it
        self.out_proj.bias.zero_()
        return take(("B_re", self.B_re, v), ("C_re", self.C_re, SMALL * o))

    def reset_parameters(self) -> None:
        """Uniform over the area of the ring: |lambda|^2 is uniform."""
        nn.init.uniform_(self.theta_log, 1e-4 * self.max_phase, self.max_phase)
        for weight in (self.B_re, self.B_im):
            nn.init.normal_(weight, std=(2 * self.dim) ** -0.5)
        for weight in (self.C_re, self.C_im):
            nn.init.normal_(weight, std=self.state_dim**-0.5)
        nn.init.normal_(self.D)
        init_linear_(self.out_proj)
        with torch.no_grad():
            # not in the dtype of the parameters: bf16 would round to 1
            square = torch.empty_like(self.nu_log, dtype=state_dtype(self.nu_log.dtype))
            square.uniform_(max(self.r_min**2, 1e-12), self.r_max**2)
            self.gamma_log.copy_(0.5 * torch.log1p(-square))
            self.nu_log.copy_(torch.log(-0.5 * square.log()))
            self.theta_log.log_()

    def forward(
        self,
        x: Tensor,
        *,
        state: LRUState | None = None,
        positions: Tensor | None = None,
        doc_ids: Tensor | None = None,
    ) -> Tensor:
        refuse_packed_streaming(state, doc_ids)
        gain = wide(self.gamma_log).exp()
        h, last = diagonal_scan(
            torch.complex(-wide(self.nu_log).exp(), wide(self.theta_log).exp()),
            torch.complex(gain * wide(linear(x, self.B_re)), gain * wide(linear(x, self.B_im))),
            initial_state=None if state is None else torch.view_as_complex(previous(state.h)),
            doc_ids=doc_ids,
            backend=self.kernel,
        )
        if state is not None:
            state.h.copy_(torch.view_as_real(handed_on(last)))
        y = linear(h.real.to(x.dtype), self.C_re) - linear(h.imag.to(x.dtype), self.C_im)
        return F.glu(self.out_proj(F.gelu(y + self.D * x)))

    def init_state(self, batch_size: int, max_len: int | None = None) -> LRUState:
        like = self.nu_log
        return LRUState(like.new_zeros(batch_size, self.state_dim, 2, dtype=state_dtype(like.dtype)))

    def state_bytes(self, batch_size: int, max_len: int) -> int:
        return batch_size * self.state_dim * 2 * state_dtype(self.nu_log.dtype).itemsize

    def forward_flops(self, batch_size: int, seq_len: int, context_len: int = 0, streaming: bool = False) -> int:
        tokens = batch_size * seq_len
        return 8 * tokens * self.dim * self.state_dim + linear_flops(tokens, self.out_proj)

    def vector_flops(self, batch_size: int, seq_len: int, context_len: int = 0) -> int:
        # scaled inputs and the complex update; real part, D x, gelu, the gated half
        return batch_size * seq_len * (10 * self.state_dim + self.dim * (1 + 2 + work.GELU + work.SIGMOID + 1))

    def activation_elements(self, batch_size: int, seq_len: int) -> int:
        # x; B x, scaled; lambda of every token and h, both complex; y, its gelu, both halves
        return batch_size * seq_len * (5 * self.dim + 8 * self.state_dim)

    def parallel_plan(self) -> ParallelPlan:
        return ParallelPlan(context="pass_state", reason="the nonlinearity behind C needs the sum over the whole state")
