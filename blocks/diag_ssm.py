"""The state space mixer of Hydra: one state a channel, elementwise gates (Chaudhary & Browne 2025, arXiv:2508.15099).

[delta; B; C; U] = W_param x;  alpha = exp(-softplus(delta) * lambda)
s_{t+1} = alpha_t * s_t + B_t * U_t;  y_t = C_t * s_t + W_skip x_t
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.blocks.recurrent import previous, wide
from zoo.contract import Block, ParallelPlan, State, init_linear_, linear_flops, refuse_packed_streaming, state_dtype
from zoo.kernels.diagonal_scan import diagonal_scan
from zoo.kernels.dispatch import check_backend
from zoo.kernels.linear import Linear
from zoo.registry import register
from zoo.row import delayed
from zoo.segments import handed_on


@dataclass
class DiagonalState(State):
    """s: [B, D], the state after the last token."""

    s: Tensor


@register(
    "diag_ssm",
    kind="mixer",
    paper="arXiv:2508.15099",
    ops=("diagonal_scan",),
    state_growth="constant",
    examples=({}, {"readout": "post"}),
)
class DiagonalSSM(Block):
    """Diagonal state space mixer: s_{t+1} = alpha_t * s_t + B_t * U_t, y_t = C_t * s_t + W_skip x_t.

    alpha = exp(-softplus(delta) * lambda) with lambda = exp(log_lambda) > 0 a channel; delta, B, C, U: the rows of
    param_proj, in this order. readout `pre` (as published) reads the state before the token is written, `post`
    after it. x: [B, T, D] -> y: [B, T, D]; 5 D^2 + D parameters, O(T D^2) time, D numbers of state.
    Useful: 10 D^2 FLOPs a token, of its maps; the state takes elementwise work alone.
    With alpha = B = 1 the state is the running sum of U; with C = 0 the block is the linear map W_skip.
    """

    scans = False

    def __init__(
        self,
        dim: int,
        *,
        readout: Literal["pre", "post"] = "pre",
        kernel: str = "auto",
        device=None,
        dtype=None,
    ):
        super().__init__(dim)
        check_backend("diagonal_scan", kernel)
        self.readout, self.kernel = readout, kernel
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.param_proj = Linear(dim, 4 * dim, bias=False, **factory)
        self.skip_proj = Linear(dim, dim, bias=False, **factory)
        self.log_lambda = nn.Parameter(torch.empty(dim, **factory))

    def reset_parameters(self) -> None:
        """lambda log-uniform in [2e-3, 0.2]: memories of about 7 to 700 tokens. The rows of B are scaled by
        sqrt(1 - alpha^2) of their channel, so that slow channels do not start with a large state."""
        for linear in (self.param_proj, self.skip_proj):
            init_linear_(linear)
        nn.init.uniform_(self.log_lambda, math.log(2e-3), math.log(0.2))
        with torch.no_grad():
            log_alpha = -math.log(2) * wide(self.log_lambda).exp()  # softplus(0) = log 2
            gain = torch.sqrt(-torch.expm1(2 * log_alpha))
            self.param_proj.weight[self.dim : 2 * self.dim] *= gain[:, None].to(self.param_proj.weight.dtype)

    def forward(
        self,
        x: Tensor,
        *,
        state: DiagonalState | None = None,
        positions: Tensor | None = None,
        doc_ids: Tensor | None = None,
    ) -> Tensor:
        refuse_packed_streaming(state, doc_ids)
        delta, B, C, U = wide(self.param_proj(x)).chunk(4, -1)
        before = None if state is None else previous(state.s)
        s, last = diagonal_scan(
            -F.softplus(delta) * wide(self.log_lambda).exp(),
            B * U,
            initial_state=before,
            doc_ids=doc_ids,
            backend=self.kernel,
        )
        if self.readout == "pre":
            s = delayed(s, before, doc_ids)
        if state is not None:  # last: `before` may be its memory
            state.s.copy_(handed_on(last))
        return (C * s).to(x.dtype) + self.skip_proj(x)

    def init_state(self, batch_size: int, max_len: int | None = None) -> DiagonalState:
        like = self.log_lambda
        return DiagonalState(like.new_zeros(batch_size, self.dim, dtype=state_dtype(like.dtype)))

    def state_bytes(self, batch_size: int, max_len: int) -> int:
        return batch_size * self.dim * state_dtype(self.log_lambda.dtype).itemsize

    def forward_flops(self, batch_size: int, seq_len: int, context_len: int = 0, streaming: bool = False) -> int:
        return linear_flops(batch_size * seq_len, self.param_proj, self.skip_proj)

    def vector_flops(self, batch_size: int, seq_len: int, context_len: int = 0) -> int:
        # softplus, times lambda, exponential; B U; the update; C s, and the skip added
        return batch_size * seq_len * 8 * self.dim

    def activation_elements(self, batch_size: int, seq_len: int) -> int:
        # x; the four maps; softplus, decay; the state, with readout 'pre' once more a token later
        return batch_size * seq_len * self.dim * (8 + (self.readout == "pre"))

    def parallel_plan(self) -> ParallelPlan:
        return ParallelPlan(
            context="pass_state", reason="param_proj stacks delta, B, C and U, so its rows are not split as they lie"
        )
