"""Exponential moving average per channel: h_t = a h_{t-1} + (1 - a) W_v x_t, y_t = W_o h_t."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zoo.contract import Block, ParallelPlan, State, init_linear_, linear_flops, refuse_packed_streaming, state_dtype
from zoo.registry import register
from zoo.schema import PositiveFloat
from zoo.segments import handed_on


@dataclass
class EMAState(State):
    """mean [B, D]: the average so far."""

    mean: Tensor


@register("ema", kind="mixer", state_growth="constant", examples=({}, {"max_timescale": 9.0}))
class EMA(Block):
    """Exponential moving average per channel: h_t = a h_{t-1} + (1 - a) W_v x_t, y_t = W_o h_t.

    x: [B, T, D] -> y: [B, T, D]; a = exp(-1 / timescale), timescales from 1 to `max_timescale`; state D
    numbers a row; T^2 D + 2 D^2 T multiply-adds a row (quadratic in T, to stay short).
    """

    def __init__(self, dim: int, *, max_timescale: PositiveFloat = 64.0, device=None, dtype=None):
        super().__init__(dim)
        self.max_timescale = max_timescale
        factory = {"device": device, "dtype": dtype}
        self.v_proj = nn.Linear(dim, dim, bias=False, **factory)
        self.o_proj = nn.Linear(dim, dim, bias=False, **factory)
        self.log_timescale = nn.Parameter(torch.empty(dim, **factory))

    def reset_parameters(self) -> None:
        init_linear_(self.v_proj)
        init_linear_(self.o_proj)
        top = torch.tensor(self.max_timescale).log().item()
        with torch.no_grad():
            self.log_timescale.copy_(torch.linspace(0, top, self.dim, device=self.log_timescale.device))

    def forward(
        self,
        x: Tensor,
        *,
        state: EMAState | None = None,
        positions: Tensor | None = None,
        doc_ids: Tensor | None = None,
    ) -> Tensor:
        refuse_packed_streaming(state, doc_ids)
        length, wide = x.shape[1], state_dtype(x.dtype)
        rate = torch.exp(-self.log_timescale.to(wide))  # -log a, [D]
        v = self.v_proj(x).to(wide) * -torch.expm1(-rate)
        step = torch.arange(length, device=x.device)
        distance = step[:, None] - step  # [T, T]
        weight = torch.exp(-rate[:, None, None] * distance.clamp(min=0)) * (distance >= 0)  # [D, T, T]
        if doc_ids is None:
            h = (weight @ v.permute(2, 1, 0)).permute(2, 1, 0)  # [D, T, T] [D, T, B]
        else:
            inside = (doc_ids[:, :, None] == doc_ids[:, None, :]).to(wide)  # [B, T, T]
            h = (weight * inside[:, None] @ v.mT[..., None])[..., 0].mT
        if state is not None:
            h = h + torch.exp(-rate * (step[:, None] + 1)) * state.mean[:, None].clone()
            state.mean.copy_(handed_on(h[:, -1]))
        return self.o_proj(h.to(x.dtype))

    def init_state(self, batch_size: int, max_len: int | None = None) -> EMAState:
        like = self.log_timescale
        return EMAState(torch.zeros(batch_size, self.dim, device=like.device, dtype=state_dtype(like.dtype)))

    def forward_flops(self, batch_size: int, seq_len: int, context_len: int = 0, streaming: bool = False) -> int:
        tokens = batch_size * seq_len
        return linear_flops(tokens, self.v_proj, self.o_proj) + 2 * tokens * seq_len * self.dim

    def state_bytes(self, batch_size: int, max_len: int) -> int:
        return batch_size * self.dim * max(4, self.itemsize)

    def activation_elements(self, batch_size: int, seq_len: int) -> int:
        return 4 * batch_size * seq_len * self.dim + 2 * self.dim * seq_len * seq_len

    def parallel_plan(self) -> ParallelPlan:
        tensor = {"v_proj": "column", "log_timescale": "column", "o_proj": "row"}
        return ParallelPlan(tensor, units=self.dim, context="pass_state")
