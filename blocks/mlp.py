"""Two-matrix feed-forward network: y = W_down f(W_up x)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from zoo.contract import Block, ParallelPlan, State, init_linear_, linear_flops
from zoo.kernels import work
from zoo.kernels.linear import Linear
from zoo.registry import register
from zoo.schema import PositiveInt

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "silu": F.silu,
}
Activation = Literal["gelu", "gelu_tanh", "relu", "relu2", "silu"]


@register(
    "mlp",
    kind="ffn",
    paper="arXiv:1706.03762",
    examples=({}, {"activation": "relu2", "hidden_dim": 96}, {"activation": "gelu_tanh", "bias": True}),
)
class MLP(Block):
    """Feed-forward network: y = W_down f(W_up x), f elementwise.

    x: [B, T, D] -> y: [B, T, D]; no state; 4 D F FLOPs a token with F = hidden_dim (default 4 D). `relu2` is
    relu(x)^2 (Primer, arXiv:2109.08668), `gelu_tanh` GPT-2's approximation. A linear f would make it a
    low-rank linear map.
    Useful: all 4 D F FLOPs a token.
    """

    def __init__(
        self,
        dim: int,
        *,
        hidden_dim: PositiveInt | None = None,
        activation: Activation = "gelu",
        bias: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__(dim)
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        self.hidden_dim, self.activation = hidden_dim or 4 * dim, activation
        factory = {"device": device, "dtype": dtype}
        self.up_proj = Linear(dim, self.hidden_dim, bias=bias, **factory)
        self.down_proj = Linear(self.hidden_dim, dim, bias=bias, **factory)

    def reset_parameters(self) -> None:
        init_linear_(self.up_proj)
        init_linear_(self.down_proj)

    def forward(
        self, x: Tensor, *, state: State | None = None, positions: Tensor | None = None, doc_ids: Tensor | None = None
    ) -> Tensor:
        return self.down_proj(ACTIVATIONS[self.activation](self.up_proj(x)))

    def forward_flops(self, batch_size: int, seq_len: int, context_len: int = 0, streaming: bool = False) -> int:
        return linear_flops(batch_size * seq_len, self.up_proj, self.down_proj)

    def vector_flops(self, batch_size: int, seq_len: int, context_len: int = 0) -> int:
        per_number = 1 if self.activation == "relu" else work.GELU  # the square of relu2 is one more too
        return batch_size * seq_len * self.hidden_dim * per_number

    def activation_elements(self, batch_size: int, seq_len: int) -> int:
        # x, before and after the activation; ReLU keeps its result alone
        return batch_size * seq_len * (self.dim + (1 if self.activation == "relu" else 2) * self.hidden_dim)

    def parallel_plan(self) -> ParallelPlan:
        return ParallelPlan({"up_proj": "column", "down_proj": "row"}, units=self.hidden_dim, context="token")
