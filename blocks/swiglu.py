"""SwiGLU feed-forward network: y = W_down (silu(W_gate x) * W_up x). Shazeer 2020, arXiv:2002.05202."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from zoo.contract import Block, ParallelPlan, State, init_linear_, linear_flops
from zoo.kernels import work
from zoo.kernels.linear import Linear
from zoo.registry import register
from zoo.schema import PositiveFloat, PositiveInt


def swiglu_width(dim: int, multiple_of: int = 16) -> int:
    """Hidden width that gives SwiGLU the parameters of a 4x MLP: 8/3 dim, rounded up."""
    return -(-8 * dim // (3 * multiple_of)) * multiple_of


@register(
    "swiglu", kind="ffn", paper="arXiv:2002.05202", examples=({"hidden_dim": 96}, {"bias": True, "gate_scale": 0.5})
)
class SwiGLU(Block):
    """Gated feed-forward network: y = W_down (silu(c W_gate x) * (W_up x)), c = gate_scale.

    x: [B, T, D] -> y: [B, T, D]; no state; 6 D F FLOPs a token with F = hidden_dim (default 8/3 D rounded
    up to 16). gate_scale is 1 but in Falcon-H1. A constant gate degenerates it to a linear map.
    Useful: all 6 D F FLOPs a token, and 3 F operations beside them.
    """

    activation = staticmethod(F.silu)

    def __init__(
        self,
        dim: int,
        *,
        hidden_dim: PositiveInt | None = None,
        bias: bool = False,
        gate_scale: PositiveFloat = 1.0,
        device=None,
        dtype=None,
    ):
        super().__init__(dim)
        self.hidden_dim, self.gate_scale = hidden_dim or swiglu_width(dim), gate_scale
        factory = {"device": device, "dtype": dtype}
        self.gate_proj = Linear(dim, self.hidden_dim, bias=bias, **factory)
        self.up_proj = Linear(dim, self.hidden_dim, bias=bias, **factory)
        self.down_proj = Linear(self.hidden_dim, dim, bias=bias, **factory)

    def reset_parameters(self) -> None:
        for linear in (self.gate_proj, self.up_proj, self.down_proj):
            init_linear_(linear)

    def forward(
        self, x: Tensor, *, state: State | None = None, positions: Tensor | None = None, doc_ids: Tensor | None = None
    ) -> Tensor:
        gate = self.gate_proj(x)
        if self.gate_scale != 1:
            gate = self.gate_scale * gate
        return self.down_proj(self.activation(gate) * self.up_proj(x))

    def forward_flops(self, batch_size: int, seq_len: int, context_len: int = 0, streaming: bool = False) -> int:
        return linear_flops(batch_size * seq_len, self.gate_proj, self.up_proj, self.down_proj)

    def vector_flops(self, batch_size: int, seq_len: int, context_len: int = 0) -> int:
        # the activation of the gate, and the product
        per_number = work.SILU + 1 + (self.gate_scale != 1)
        return batch_size * seq_len * self.hidden_dim * per_number

    def activation_elements(self, batch_size: int, seq_len: int) -> int:
        # x, gate, up, silu(gate), silu(gate) * up
        return batch_size * seq_len * (self.dim + 4 * self.hidden_dim)

    def parallel_plan(self) -> ParallelPlan:
        return ParallelPlan(
            {"gate_proj": "column", "up_proj": "column", "down_proj": "row"}, units=self.hidden_dim, context="token"
        )
