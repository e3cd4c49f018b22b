"""Expert networks of mixtures: tokens sorted by expert, two grouped matrix products, no capacity."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.blocks.measure import group_counts
from zoo.blocks.mlp import ACTIVATIONS
from zoo.kernels import work
from zoo.kernels.grouped_mm import grouped_mm
from zoo.kernels.grouped_mm.cost import flops as grouped_mm_flops
from zoo.kernels.grouped_mm.tokens import swiglu_tokens


class Experts(nn.Module):
    """E networks of one kind: y_n = sum_j w_nj FFN_{i_nj}(x_n), every assignment computed (dropless), so that a token's
    output does not depend on the other tokens."""

    matrices: tuple[str, ...]
    biased = False

    def __init__(self, num_experts: int, dim: int, hidden_dim: int, kernel: str):
        super().__init__()
        self.num_experts, self.dim, self.hidden_dim, self.kernel = num_experts, dim, hidden_dim, kernel

    def reset_parameters(self) -> None:
        for name in self.matrices:
            weight = getattr(self, name)
            std = weight.shape[-1] ** -0.5
            nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std)

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """x: [N, D]; indices, weights: [N, k]; returns [N, D]."""
        N, k = indices.shape
        order = indices.flatten().argsort(stable=True)
        of = indices.flatten().index_select(0, order) if self.biased else None
        y = self._networks(x.index_select(0, order // k), group_counts(indices, self.num_experts), of)
        # back to token order first, so that the sum over experts runs in the same order whatever the batch
        y = y.index_select(0, order.argsort()).view(N, k, self.dim)
        return (y * weights[..., None]).sum(1).to(x.dtype)

    def _networks(self, rows: Tensor, counts: Tensor, of: Tensor | None) -> Tensor:
        """FFN of rows [N k, D] that lie by expert, `counts` for each; with biases `of` says whose each row is."""
        raise NotImplementedError

    def _product(self, rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        return grouped_mm(rows, weight.transpose(1, 2), counts, backend=self.kernel)

    def idle(self, choices: int, top_k: int) -> float:
        """Experts that nobody chooses where so many choices of `top_k` fall evenly, as is expected."""
        return self.num_experts * (1 - top_k / self.num_experts) ** choices

    @property
    def params_per_expert(self) -> int:
        """Parameters of one network."""
        raise NotImplementedError


class MLPExperts(Experts):
    """E networks W_down f(W_up x) without a gate (Nemotron 3). up_proj: [E, I, D]; down_proj: [E, D, I]."""

    matrices = ("up_proj", "down_proj")

    def __init__(
        self,
        num_experts: int,
        dim: int,
        hidden_dim: int,
        kernel: str = "auto",
        *,
        activation: str,
        device=None,
        dtype=None,
    ):
        super().__init__(num_experts, dim, hidden_dim, kernel)
        self.activation = activation
        factory = {"device": device, "dtype": dtype}
        self.up_proj = nn.Parameter(torch.empty(num_experts, hidden_dim, dim, **factory))
        self.down_proj = nn.Parameter(torch.empty(num_experts, dim, hidden_dim, **factory))

    def _networks(self, rows: Tensor, counts: Tensor, of: Tensor | None) -> Tensor:
        hidden = ACTIVATIONS[self.activation](self._product(rows, self.up_proj, counts))
        return self._product(hidden, self.down_proj, counts)

    def flops(self, assignments: int) -> int:
        """Matrix FLOPs of `assignments` (tokens times experts per token)."""
        up = grouped_mm_flops(assignments, self.dim, self.hidden_dim)
        return up + grouped_mm_flops(assignments, self.hidden_dim, self.dim)

    def vector_flops(self, assignments: int) -> int:
        """Work outside matrix products: the activation, outputs weighted and summed."""
        return assignments * (work.SILU * self.hidden_dim + 2 * self.dim)

    def activation_elements(self, assignments: int) -> int:
        """Kept for backward: rows, before and after the activation, outputs, and both orders as int64."""
        return assignments * (2 * self.dim + 2 * self.hidden_dim + 4)

    @property
    def params_per_expert(self) -> int:
        return 2 * self.dim * self.hidden_dim


class SwiGLUExperts(Experts):
    """E SwiGLU networks: y_n = sum_j w_nj FFN_{i_nj}(x_n).

    gate_up_proj: [E, 2 I, D], gate rows first; down_proj: [E, D, I] (the layout of Hugging Face's Mixtral); with `bias`
    also gate_up_proj_bias: [E, 2 I] and down_proj_bias: [E, D]. With a `limit` L, GPT-OSS's unit stands for silu(g) u:
    (u + 1) g sigmoid(1.702 g) of g <= L and |u| <= L.
    """

    matrices = ("gate_up_proj", "down_proj")

    def __init__(
        self,
        num_experts: int,
        dim: int,
        hidden_dim: int,
        kernel: str = "auto",
        *,
        bias: bool = False,
        limit: float | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__(num_experts, dim, hidden_dim, kernel)
        self.limit, self.biased = limit, bias
        factory = {"device": device, "dtype": dtype}
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * hidden_dim, dim, **factory))
        self.down_proj = nn.Parameter(torch.empty(num_experts, dim, hidden_dim, **factory))
        self.gate_up_proj_bias = self.down_proj_bias = None
        if bias:
            self.gate_up_proj_bias = nn.Parameter(torch.empty(num_experts, 2 * hidden_dim, **factory))
            self.down_proj_bias = nn.Parameter(torch.empty(num_experts, dim, **factory))

    def reset_parameters(self) -> None:
        for bias in (self.gate_up_proj_bias, self.down_proj_bias):
            if bias is not None:
                nn.init.zeros_(bias)
        super().reset_parameters()

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        if self.kernel == "auto" and not self.biased and self.limit is None:
            few = swiglu_tokens(x, indices, weights, self.gate_up_proj, self.down_proj)
            if few is not None:
                return few
        return super().forward(x, indices, weights)

    def _networks(self, rows: Tensor, counts: Tensor, of: Tensor | None) -> Tensor:
        gate_up = self._product(rows, self.gate_up_proj, counts)
        if self.gate_up_proj_bias is not None and of is not None:
            gate_up = gate_up + self.gate_up_proj_bias.index_select(0, of)
        y = self._product(self._unit(*gate_up.chunk(2, dim=-1)), self.down_proj, counts)
        if self.down_proj_bias is not None and of is not None:
            y = y + self.down_proj_bias.index_select(0, of)
        return y

    def _unit(self, gate: Tensor, up: Tensor) -> Tensor:
        if self.limit is None:
            return F.silu(gate) * up
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)

    def flops(self, assignments: int) -> int:
        """Matrix FLOPs of `assignments` (tokens times experts per token)."""
        up = grouped_mm_flops(assignments, self.dim, 2 * self.hidden_dim)
        return up + grouped_mm_flops(assignments, self.hidden_dim, self.dim)

    def vector_flops(self, assignments: int) -> int:
        """Work outside matrix products: silu, the product, clamps, biases, outputs weighted and summed."""
        unit = work.SILU + 1 + 5 * (self.limit is not None)  # min of the gate, min and max of up, + 1, * 1.702
        biases = (2 * self.hidden_dim + self.dim) * self.biased
        return assignments * (unit * self.hidden_dim + biases + 2 * self.dim)

    def activation_elements(self, assignments: int) -> int:
        """Kept for backward: rows, gate and up, silu(gate), their product, outputs, and both orders as int64; of the
        clamped unit also what is clamped, its product and the sigmoid; with biases whose each row is."""
        hidden = 4 if self.limit is None else 7
        return assignments * (2 * self.dim + hidden * self.hidden_dim + 4 + 2 * self.biased)

    @property
    def params_per_expert(self) -> int:
        biases = 0 if self.gate_up_proj_bias is None else 2 * self.hidden_dim + self.dim
        return 3 * self.dim * self.hidden_dim + biases
