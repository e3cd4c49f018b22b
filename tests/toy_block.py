"""A small block that keeps the whole law; `tests/test_conformance_can_fail.py` breaks it in many ways."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zoo.contract import (
    Block,
    ParallelPlan,
    State,
    init_linear_,
    linear_flops,
    positions_from,
    refuse_packed_streaming,
    state_dtype,
)
from zoo.kernels.short_conv import short_conv
from zoo.registry import register
from zoo.schema import PositiveInt
from zoo.segments import handed_on


@dataclass
class ToyState(State):
    """Decayed sum, inputs of the convolution, tokens seen."""

    sum: Tensor
    conv: Tensor
    seen: Tensor


@register(
    "toy",
    kind="mixer",
    ops=("short_conv",),
    state_growth="constant",
    relations=("toy(width=4) == toy()",),
    examples=({}, {"width": 3, "gate": True}),
)
class Toy(Block):
    """y_t = W_o sum_{s<=t} 0.9^(t-s) cos(pos_s / 10) conv(W_v x)_s (* g)."""

    def __init__(self, dim: int, *, width: PositiveInt = 4, gate: bool = False, device=None, dtype=None):
        super().__init__(dim)
        factory = {"device": device, "dtype": dtype}
        self.v_proj = nn.Linear(dim, dim, bias=False, **factory)
        self.o_proj = nn.Linear(dim, dim, bias=False, **factory)
        self.conv = nn.Parameter(torch.empty(dim, width, **factory))
        self.gate = nn.Parameter(torch.empty(dim, **factory)) if gate else None

    def reset_parameters(self) -> None:
        init_linear_(self.v_proj)
        init_linear_(self.o_proj)
        nn.init.normal_(self.conv, std=0.5)
        if self.gate is not None:
            nn.init.zeros_(self.gate)

    def decay(self, doc_ids: Tensor | None, length: int, like: Tensor) -> Tensor:
        step = torch.arange(length, device=like.device)
        distance = step[:, None] - step
        weight = torch.where(distance >= 0, 0.9 ** distance.clamp(min=0).to(like.dtype), 0.0)
        return weight if doc_ids is None else weight * (doc_ids[:, :, None] == doc_ids[:, None, :])

    def forward(
        self,
        x: Tensor,
        *,
        state: ToyState | None = None,
        positions: Tensor | None = None,
        doc_ids: Tensor | None = None,
    ) -> Tensor:
        refuse_packed_streaming(state, doc_ids)
        batch, length, _ = x.shape
        if positions is None:
            positions = positions_from(doc_ids, batch, length, x.device)
            positions = positions if state is None else positions + state.seen[:, None]
        v, conv = short_conv(self.v_proj(x), self.conv, state=None if state is None else state.conv, doc_ids=doc_ids)
        wide = state_dtype(x.dtype)
        v = v.to(wide) * torch.cos(positions.to(wide) / 10)[..., None]
        y = torch.matmul(self.decay(doc_ids, length, v).expand(batch, length, length), v)
        if state is not None:
            power = 0.9 ** torch.arange(1, length + 1, device=x.device, dtype=wide)
            y = y + power[:, None] * state.sum[:, None].clone()
            state.sum.copy_(handed_on(y[:, -1]))
            state.conv.copy_(handed_on(conv))
            state.seen += length
        y = y if self.gate is None else y * (1 + self.gate)
        return self.o_proj(y.to(x.dtype))

    def init_state(self, batch_size: int, max_len: int | None = None) -> ToyState:
        like = self.conv
        wide = state_dtype(like.dtype)
        return ToyState(
            torch.zeros(batch_size, self.dim, device=like.device, dtype=wide),
            torch.zeros(batch_size, self.conv.shape[1] - 1, self.dim, device=like.device, dtype=like.dtype),
            torch.zeros(batch_size, device=like.device, dtype=torch.int64),
        )

    def forward_flops(self, batch_size: int, seq_len: int, context_len: int = 0, streaming: bool = False) -> int:
        linear = linear_flops(batch_size * seq_len, self.v_proj, self.o_proj)
        return linear + 2 * batch_size * seq_len * seq_len * self.dim

    def state_bytes(self, batch_size: int, max_len: int) -> int:
        size = self.itemsize
        return batch_size * (self.dim * max(4, size) + (self.conv.shape[1] - 1) * self.dim * size + 8)

    def activation_elements(self, batch_size: int, seq_len: int) -> int:
        # x, what the convolution reads, y, and y times its gate; cosines; the decay between all tokens
        streams = 3 if self.gate is None else 4
        return batch_size * seq_len * (streams * self.dim + 1) + seq_len * seq_len

    def parallel_plan(self) -> ParallelPlan:
        tensor = {"v_proj": "column", "conv": "column", "o_proj": "row"}
        if self.gate is not None:
            tensor["gate"] = "column"
        return ParallelPlan(tensor, units=self.dim, context="pass_state")
