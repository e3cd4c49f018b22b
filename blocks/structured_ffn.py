"""SwiGLU of structured matrices, trained beside dense ones that fade out (arXiv:2406.16450).

y = A_down (silu(A_gate x) * A_up x), every A of one structure: low-rank, block-dense, block-shuffle, Monarch
(arXiv:2204.00595) or BLAST (arXiv:2410.21262). Self-guided training puts g W x + (1 - g) A x in the place of A x.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.blocks.structured_linear import STRUCTURES, StructuredLinear
from zoo.blocks.swiglu import SwiGLU, swiglu_width
from zoo.contract import Block, ParallelPlan, State, state_dtype
from zoo.kernels import work
from zoo.kernels.dispatch import check_backend
from zoo.registry import register
from zoo.schema import NonNegativeInt, PositiveInt, Range


def guide_schedule(step: int, steps: int) -> float:
    """The guide's coefficient at `step` of `steps`: a cosine from 1 to 0 over the first half of training."""
    return (1 + math.cos(math.pi * min(2 * step / steps, 1.0))) / 2


@register(
    "structured_ffn",
    kind="ffn",
    paper="arXiv:2406.16450",
    ops=("block_linear",),
    relations=(
        "structured_ffn(guide=1.0) == swiglu()",
        "structured_ffn(structure='blast', guide=1.0) == swiglu()",
        "structured_ffn(structure='monarch') == structured_ffn(structure='block_shuffle')",
        "structured_ffn(rank=64, hidden_dim=64) == swiglu(hidden_dim=64) at lr1.weight=eye, "
        "gate_proj.lr2.weight=gate_proj.weight, up_proj.lr2.weight=up_proj.weight, "
        "down_proj.lr2.weight=down_proj.weight",
        "structured_ffn(structure='monarch', blocks=2, rank=32, hidden_dim=64) == swiglu(hidden_dim=64) at "
        "blkdiag1[:, ::2]=eye, blkdiag1[:, 1::2]=eye, gate_proj.blkdiag2[0]=gate_proj.weight[::2], "
        "gate_proj.blkdiag2[1]=gate_proj.weight[1::2], up_proj.blkdiag2[0]=up_proj.weight[::2], "
        "up_proj.blkdiag2[1]=up_proj.weight[1::2], down_proj.blkdiag2[0]=down_proj.weight[::2], "
        "down_proj.blkdiag2[1]=down_proj.weight[1::2]",
        "structured_ffn(structure='blast', blocks=2, rank=64, hidden_dim=64) == swiglu(hidden_dim=64) at "
        "s=1, v=0, v[0, :, :32]=eye, v[1, :, 32:]=eye, gate_proj.u[0]=gate_proj.weight[:32], "
        "gate_proj.u[1]=gate_proj.weight[32:], up_proj.u[0]=up_proj.weight[:32], "
        "up_proj.u[1]=up_proj.weight[32:], down_proj.u[0]=down_proj.weight[:32], "
        "down_proj.u[1]=down_proj.weight[32:]",
        "structured_ffn(structure='block_dense', blocks=1, rank=64, hidden_dim=64) == "
        "structured_ffn(rank=64, hidden_dim=64) at gate_proj.blkdiag[0]=gate_proj.lr1.weight, "
        "up_proj.blkdiag[0]=up_proj.lr1.weight, down_proj.blkdiag[0]=down_proj.lr1.weight, "
        "gate_proj.lr.weight=gate_proj.lr2.weight, "
        "up_proj.lr.weight=up_proj.lr2.weight, down_proj.lr.weight=down_proj.lr2.weight",
    ),
    examples=(
        {"hidden_dim": 96, "guide": 0.5},
        {"hidden_dim": 96, "structure": "block_dense", "rank": 32, "blocks": 2},
        {"hidden_dim": 96, "structure": "block_shuffle"},
        {"hidden_dim": 96, "structure": "monarch", "rank": 2},
        {"hidden_dim": 96, "structure": "blast", "guide": 0.5, "guide_steps": 10},
    ),
)
class StructuredFFN(Block):
    """SwiGLU whose three matrices are products of small ones: y = A_down (silu(A_gate x) * A_up x).

    structure: low_rank A = U V; block_dense a block-diagonal factor, then a dense one; block_shuffle two
    block-diagonal ones with transpositions (Monarch's form with inner width min(in, out)); monarch; blast, block
    (i, j) = U_i diag(s_ij) V_j^T. `blocks` b divides every width. `rank` r is that of A (low_rank, block_dense;
    default D / 4), or of each of A's b x b blocks (blast: D / 4; monarch: as block_shuffle).

    x: [B, T, D] -> y: [B, T, D]; no state. Parameters of an [m, n] matrix: low_rank r (m + n), block_dense
    r (m + n / b), block_shuffle and monarch q (m + n) with q = min(m, n) / b or r b, blast r (m + n + b^2); FLOPs
    a token twice that. Full rank (low_rank r = min(m, n), monarch r = min(m, n) / b): any SwiGLU.

    Self-guided training: with guide > 0 each matrix has a dense companion W that starts as A, and A x becomes
    g W x + (1 - g) A x. The buffer `guide` holds g, which falls to 0 along a cosine within `guide_steps` optimiser
    steps (the paper: half of training) or, at 0, where a recipe sets it (`set_guide`, `guide_schedule`). At g = 1 this
    is SwiGLU; at 0 `merge()` drops the companions and changes nothing. `dense()` multiplies out.
    Useful: two FLOPs a token for each parameter; companions that guide it count as well.
    """

    guide: Tensor | None
    steps_done: Tensor | None

    def __init__(
        self,
        dim: int,
        *,
        structure: Literal["low_rank", "block_dense", "block_shuffle", "monarch", "blast"] = "low_rank",
        hidden_dim: PositiveInt | None = None,
        rank: PositiveInt | None = None,
        blocks: PositiveInt = 4,
        guide: Annotated[float, Range(ge=0, le=1)] = 0.0,
        guide_steps: NonNegativeInt = 0,
        kernel: str = "auto",
        device=None,
        dtype=None,
    ):
        super().__init__(dim)
        if structure not in STRUCTURES:
            raise ValueError(f"structure must be one of {', '.join(STRUCTURES)}, got {structure!r}")
        check_backend("block_linear", kernel)
        if guide_steps and not guide:
            raise ValueError(f"guide_steps={guide_steps} lower the guide, which is 0: give guide, or leave them out")
        self.structure, self.guide_start, self.guide_steps = structure, guide, guide_steps
        self.hidden_dim = hidden_dim or swiglu_width(dim)
        if structure == "block_shuffle" and rank is not None:
            raise ValueError(f"rank={rank} is not free with structure: block_shuffle; use monarch, or leave it out")
        if structure != "low_rank" and (dim % blocks or self.hidden_dim % blocks):
            raise ValueError(f"blocks={blocks} must divide dim={dim} and hidden_dim={self.hidden_dim}")
        if rank is None and structure in ("low_rank", "block_dense", "blast"):
            rank = -(-dim // (4 * blocks)) * blocks
        if structure == "block_dense" and rank and rank % blocks:
            raise ValueError(f"blocks={blocks} must divide rank={rank}")
        if structure in ("low_rank", "block_dense") and rank and rank > min(dim, self.hidden_dim):
            raise ValueError(f"rank={rank} is more than min(dim, hidden_dim)={min(dim, self.hidden_dim)}; lower it")
        options = {
            "rank": rank, "blocks": blocks, "guided": guide > 0, "kernel": kernel, "device": device, "dtype": dtype
        }  # fmt: skip
        layer = STRUCTURES[structure]
        self.gate_proj = layer(dim, self.hidden_dim, **options)
        self.up_proj = layer(dim, self.hidden_dim, **options)
        self.down_proj = layer(self.hidden_dim, dim, **options)
        wide = state_dtype(dtype or torch.get_default_dtype())
        self.register_buffer("guide", torch.empty((), device=device, dtype=wide) if guide > 0 else None)
        count = torch.empty((), dtype=torch.int64, device=device) if guide_steps else None
        self.register_buffer("steps_done", count)

    def _layers(self) -> tuple[StructuredLinear, ...]:
        return self.gate_proj, self.up_proj, self.down_proj

    def reset_parameters(self) -> None:
        for layer in self._layers():
            layer.reset_parameters()
        if self.guide is not None:
            self.guide.fill_(self.guide_start)
        if self.steps_done is not None:
            self.steps_done.zero_()

    def forward(
        self, x: Tensor, *, state: State | None = None, positions: Tensor | None = None, doc_ids: Tensor | None = None
    ) -> Tensor:
        g = self.guide
        return self.down_proj(F.silu(self.gate_proj(x, g)) * self.up_proj(x, g), g)

    def set_guide(self, coefficient: float) -> None:
        """Set g of self-guided training; 1: the dense matrices alone, 0: the structured ones alone."""
        if self.guide is None:
            raise ValueError("this block has no dense companions; build it with guide > 0")
        if not 0 <= coefficient <= 1:
            raise ValueError(f"the guide's coefficient must be in [0, 1], got {coefficient}")
        self.guide.fill_(coefficient)

    @torch.no_grad()
    def after_step(self) -> None:
        """Lower the coefficient; once per optimiser step."""
        if self.steps_done is not None and self.guide is not None:
            self.steps_done.add_(1)
            self.guide.fill_(self.guide_start * guide_schedule(int(self.steps_done), 2 * self.guide_steps))

    def merge(self) -> dict[str, Any]:
        """Drop the dense companions once their coefficient is 0: the same function, as built with the options that
        are returned."""
        if self.guide is None:
            return {}
        if self.guide.item() != 0:
            raise ValueError(f"the dense companions still count {self.guide.item():g}; set_guide(0) first")
        self.guide = self.steps_done = None
        for layer in self._layers():
            layer.weight = None
        return {"guide": 0.0, "guide_steps": 0}

    @torch.no_grad()
    def dense(self) -> SwiGLU:
        """The same function as a SwiGLU: more memory, quicker for a few tokens at a time."""
        like = self.reference_parameter
        swiglu = SwiGLU(self.dim, hidden_dim=self.hidden_dim, device=like.device, dtype=like.dtype)
        for ours, theirs in zip(self._layers(), (swiglu.gate_proj, swiglu.up_proj, swiglu.down_proj), strict=True):
            theirs.weight.copy_(ours.matrix(self.guide))
        return swiglu.train(self.training)

    def forward_flops(self, batch_size: int, seq_len: int, context_len: int = 0, streaming: bool = False) -> int:
        return sum(layer.flops(batch_size * seq_len) for layer in self._layers())

    def vector_flops(self, batch_size: int, seq_len: int, context_len: int = 0) -> int:
        mixed = 0 if self.guide is None else 3 * (2 * self.hidden_dim + self.dim)
        return batch_size * seq_len * ((work.SILU + 1) * self.hidden_dim + mixed)

    def activation_elements(self, batch_size: int, seq_len: int) -> int:
        # x, gate, up, silu(gate), silu(gate) * up, and what lies between the factors
        inner = sum(layer.inner_width() for layer in self._layers())
        return batch_size * seq_len * (self.dim + 4 * self.hidden_dim + inner)

    def parallel_plan(self) -> ParallelPlan:
        plan = {"gate_proj": "replicate", "up_proj": "replicate", "down_proj": "replicate"}
        return ParallelPlan(plan, context="token", reason="the shuffles between factors mix all channels")
