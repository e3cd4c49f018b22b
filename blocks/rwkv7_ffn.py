"""Channel mix of RWKV-7: a squared-ReLU network of the token and the one before it. Peng et al. 2025,
arXiv:2503.14456."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.blocks.recurrent import previous
from zoo.blocks.rwkv7 import mixing_weights, token_shift
from zoo.contract import Block, ParallelPlan, State, linear_flops, refuse_packed_streaming
from zoo.kernels.linear import Linear
from zoo.registry import register
from zoo.schema import NonNegativeInt, PositiveInt
from zoo.segments import handed_on


@dataclass
class ShiftState(State):
    """shift: [B, D], the last token."""

    shift: Tensor


@register(
    "rwkv7_ffn",
    kind="ffn",
    paper="arXiv:2503.14456",
    state_growth="constant",
    relations=(
        "rwkv7_ffn(hidden_dim=96) == mlp(activation='relu2', hidden_dim=96) at x_k=0, key.weight=up_proj.weight, "
        "value.weight=down_proj.weight",
    ),
    examples=({}, {"hidden_dim": 96, "layer_index": 2, "num_layers": 3}),
)
class RWKV7FeedForward(Block):
    """RWKV-7 channel mix: y = W_value relu(W_key (x + (x_prev - x) * x_k))^2.

    x: [B, T, D] -> y: [B, T, D]; state: the last token; 4 D F FLOPs a token with F = hidden_dim (default 4 D).
    Names and shapes are those of flash-linear-attention. W_value starts at zero; layer_index (mixers before it) of
    num_layers only sets the initial x_k. With x_k = 0 it is the squared-ReLU network `mlp`.
    Useful: all 4 D F FLOPs a token.
    """

    scans = False

    def __init__(
        self,
        dim: int,
        *,
        hidden_dim: PositiveInt | None = None,
        layer_index: NonNegativeInt = 0,
        num_layers: PositiveInt = 1,
        device=None,
        dtype=None,
    ):
        super().__init__(dim)
        if layer_index > num_layers:
            raise ValueError(f"layer_index={layer_index} must be at most num_layers={num_layers}")
        self.hidden_dim = hidden_dim or 4 * dim
        # layer_index counts the mixers in front, its own layer's among them
        self.depth = max(layer_index - 1, 0) / num_layers
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.x_k = nn.Parameter(torch.empty(dim, **factory))
        self.key = Linear(dim, self.hidden_dim, bias=False, **factory)
        self.value = Linear(self.hidden_dim, dim, bias=False, **factory)

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.x_k.copy_(mixing_weights(self.dim, (1 - self.depth) ** 4, self.x_k))
        nn.init.uniform_(self.key.weight, -0.5 * self.dim**-0.5, 0.5 * self.dim**-0.5)
        nn.init.zeros_(self.value.weight)

    def forward(
        self,
        x: Tensor,
        *,
        state: ShiftState | None = None,
        positions: Tensor | None = None,
        doc_ids: Tensor | None = None,
    ) -> Tensor:
        refuse_packed_streaming(state, doc_ids)
        before = token_shift(x, None if state is None else previous(state.shift), doc_ids)
        if state is not None:
            state.shift.copy_(handed_on(x[:, -1]))
        return self.value(F.relu(self.key(torch.addcmul(x, before - x, self.x_k))).square())

    def init_state(self, batch_size: int, max_len: int | None = None) -> State:
        return ShiftState(self.x_k.new_zeros(batch_size, self.dim))

    def state_bytes(self, batch_size: int, max_len: int) -> int:
        return batch_size * self.dim * self.itemsize

    def forward_flops(self, batch_size: int, seq_len: int, context_len: int = 0, streaming: bool = False) -> int:
        return linear_flops(batch_size * seq_len, self.key, self.value)

    def vector_flops(self, batch_size: int, seq_len: int, context_len: int = 0) -> int:
        return batch_size * seq_len * (3 * self.dim + 2 * self.hidden_dim)  # token shift; relu and square

    def activation_elements(self, batch_size: int, seq_len: int) -> int:
        # the step and the mix; after ReLU and after the square
        return batch_size * seq_len * (2 * self.dim + 2 * self.hidden_dim)

    def parallel_plan(self) -> ParallelPlan:
        return ParallelPlan(
            {"x_k": "replicate", "key": "column", "value": "row"}, units=self.hidden_dim, context="halo"
        )
