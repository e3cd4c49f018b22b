"""Expert SwiGLU networks of mixtures: tokens sorted by expert, two grouped matrix products, no capacity."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.blocks.measure import group_counts
from zoo.kernels import work
from zoo.kernels.grouped_mm import grouped_mm
from zoo.kernels.grouped_mm.cost import flops as grouped_mm_flops
from zoo.kernels.grouped_mm.tokens import swiglu_tokens


class SwiGLUExperts(nn.Module):
    """E SwiGLU networks: y_n = sum_j w_nj FFN_{i_nj}(x_n).

    gate_up_proj: [E, 2 I, D], gate rows first; down_proj: [E, D, I] (the layout of Hugging Face's Mixtral).
    Every assignment is computed (dropless), so a token's output does not depend on the other tokens.
    """

    matrices = ("gate_up_proj", "down_proj")

    def __init__(self, num_experts: int, dim: int, hidden_dim: int, kernel: str = "auto", device=None, dtype=None):
        super().__init__()
        self.num_experts, self.dim, self.hidden_dim, self.kernel = num_experts, dim, hidden_dim, kernel
        factory = {"device": device, "dtype": dtype}
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * hidden_dim, dim, **factory))
        self.down_proj = nn.Parameter(torch.empty(num_experts, dim, hidden_dim, **factory))

    def reset_parameters(self) -> None:
        for weight in (self.gate_up_proj, self.down_proj):
            std = weight.shape[-1] ** -0.5
            nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std)

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """x: [N, D]; indices, weights: [N, k]; returns [N, D]."""
        N, k = indices.shape
        if self.kernel == "auto":
            few = swiglu_tokens(x, indices, weights, self.gate_up_proj, self.down_proj)
            if few is not None:
                return few
        order = indices.flatten().argsort(stable=True)
        counts = group_counts(indices, self.num_experts)
        rows = x.index_select(0, order // k)
        gate, up = grouped_mm(rows, self.gate_up_proj.transpose(1, 2), counts, backend=self.kernel).chunk(2, dim=-1)
        y = grouped_mm(F.silu(gate) * up, self.down_proj.transpose(1, 2), counts, backend=self.kernel)
        # back to token order first, so that the sum over experts runs in the same order whatever the batch
        y = y.index_select(0, order.argsort()).view(N, k, self.dim)
        return (y * weights[..., None]).sum(1).to(x.dtype)

    def flops(self, assignments: int) -> int:
        """Matrix FLOPs of `assignments` (tokens times experts per token)."""
        up = grouped_mm_flops(assignments, self.dim, 2 * self.hidden_dim)
        return up + grouped_mm_flops(assignments, self.hidden_dim, self.dim)

    def vector_flops(self, assignments: int) -> int:
        """Work outside matrix products: silu, the product, outputs weighted and summed."""
        return assignments * ((work.SILU + 1) * self.hidden_dim + 2 * self.dim)

    def activation_elements(self, assignments: int) -> int:
        """Kept for backward: rows, gate and up, silu(gate), their product, outputs, and both orders as int64."""
        return assignments * (2 * self.dim + 4 * self.hidden_dim + 4)

    def unread(self, choices: int, top_k: int) -> int:
        """Parameters that nobody reads where so many choices of `top_k` experts fall evenly, as is expected."""
        return round(self.num_experts * (1 - top_k / self.num_experts) ** choices * self.params_per_expert)

    @property
    def params_per_expert(self) -> int:
        return 3 * self.dim * self.hidden_dim
