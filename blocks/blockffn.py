"""BlockFFN: experts switched by a ReLU router, sparse per token and per chunk (arXiv:2507.08771).

z = W_r x; a = gamma * RMSNorm(ReLU(z)) over the experts; h = f(W_up x), its rows in E groups of d_e, one per
expert; y = W_down (a_e h_e). An expert with a_e = 0 does nothing; there is no top-k and no balance loss.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.blocks.measure import chunk_level_sparsity, recording
from zoo.blocks.mlp import ACTIVATIONS, Activation
from zoo.blocks.norms import RMSNorm
from zoo.contract import (
    Block,
    ParallelPlan,
    State,
    add_auxiliary_loss,
    init_linear_,
    linear_flops,
    own_part,
    positions_from,
    state_dtype,
)
from zoo.kernels import work
from zoo.kernels.attention import TwoCopies
from zoo.kernels.linear import Linear, linear
from zoo.kernels.precision import no_autocast
from zoo.registry import register
from zoo.row import current, whole
from zoo.schema import NonNegativeFloat, PositiveInt

SHARPNESS = 100.0  # of the locality loss: sigmoid(100 z) is nearly "z > 0"


def locality_loss(z: Tensor, doc_ids: Tensor | None = None) -> Tensor:
    """Cross entropy between the sharpened activation patterns of neighbouring tokens of one document.

    z: [B, T, E] router logits. Both sides carry gradient; 0 where no token has a neighbour.
    """
    before, after = SHARPNESS * z[:, :-1], torch.sigmoid(SHARPNESS * z[:, 1:])
    terms = (F.softplus(before) - before * after).mean(-1)  # [B, T-1]
    if doc_ids is None:
        return terms.sum() / max(terms.numel(), 1)
    same = (doc_ids[:, 1:] == doc_ids[:, :-1]).to(terms.dtype)
    return (terms * same).sum() / same.sum().clamp(min=1)


def chunk_sparsity_loss(z: Tensor, chunk_size: int, doc_ids: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """Mean probability that an expert is used at least once in a chunk of `chunk_size` tokens.

    z: [B, T, E]; p = v / (sum_e v + 1e-5) with v = RMSNorm(ReLU(z)) without gain; chunks restart with each
    document and the last may be shorter. For p in {0, 1} it is the share of experts in the chunk's union.
    """
    B, T, E = z.shape
    active = F.relu(z)
    v = active * torch.rsqrt(active.square().mean(-1, keepdim=True) + eps)
    p = v / (v.sum(-1, keepdim=True) + 1e-5)
    chunk = (positions_from(doc_ids, B, T, z.device) % chunk_size == 0).long().cumsum(1) - 1
    bound = -(-T // chunk_size) if doc_ids is None else T
    silent = torch.log(1 - p + 1e-5)  # log probability that the token leaves the expert alone
    silent = silent.new_zeros(B, bound, E).scatter_add(1, chunk[..., None].expand(B, T, E), silent)
    exists = (torch.arange(bound, device=z.device) <= chunk[:, -1:]).to(z.dtype)
    return 1 - (silent.exp().mean(-1) * exists).sum() / exists.sum()


@register(
    "blockffn",
    kind="ffn",
    paper="arXiv:2507.08771",
    examples=(
        {"num_experts": 8, "expert_dim": 16, "chunk_size": 16},
        {"num_experts": 6, "expert_dim": 8, "activation": "relu", "locality_coef": 0.0, "sparsity_coef": 0.0},
        {"num_experts": 8, "expert_dim": 16, "chunk_size": 16, "inference": "union"},
    ),
)
class BlockFFN(Block):
    """BlockFFN: y = W_down (repeat(a, d_e) * f(W_up x)), a = gamma RMSNorm(ReLU(W_r x)), one a per expert.

    RMSNorm separates how many experts fire from how strong they are, so two training losses may push for
    sparsity: `locality` (neighbouring tokens use the same experts, coefficient locality_coef) and `sparsity`
    (few experts in the union of a chunk of chunk_size tokens, sparsity_coef); both respect documents. A training
    recipe may set the two coefficients as it goes. Metrics: both losses; TLS, the share of silent (token, expert)
    pairs; and CLS8, CLS<chunk_size>, the share of experts that a window of so many tokens leaves alone.

    x: [B, T, D] -> y: [B, T, D]; no state. E = num_experts of width d_e = expert_dim (default: E d_e about 4 D).
    `forward` computes every expert: 2 D E + 4 D E d_e FLOPs a token. inference='union': a call of at most chunk_size
    tokens with a state (decoding, the drafts of speculative decoding) reads only the experts that some of them use, as
    `forward_union` does; its predicted cost remains that of all. A constant router makes it a plain MLP.
    Useful: 2 D E + 4 D E d_e FLOPs a token, as if every expert fired: no number is known beforehand.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_experts: PositiveInt = 48,
        expert_dim: PositiveInt | None = None,
        activation: Activation = "silu",
        chunk_size: PositiveInt = 64,
        locality_coef: NonNegativeFloat = 2e-3,
        sparsity_coef: NonNegativeFloat = 5e-2,
        inference: Literal["all", "union"] = "all",
        device=None,
        dtype=None,
    ):
        super().__init__(dim)
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        self.num_experts, self.activation, self.chunk_size = num_experts, activation, chunk_size
        self.expert_dim = expert_dim or -(-4 * dim // (8 * num_experts)) * 8
        self.locality_coef, self.sparsity_coef, self.inference = locality_coef, sparsity_coef, inference
        factory = {"device": device, "dtype": dtype}
        self.router = Linear(dim, num_experts, bias=False, **factory)
        self.router_norm = RMSNorm(num_experts, **factory)
        self.up_proj = Linear(dim, num_experts * self.expert_dim, bias=False, **factory)
        self.down_proj = Linear(num_experts * self.expert_dim, dim, bias=False, **factory)
        self.metrics: dict[str, Tensor] = {}

    def reset_parameters(self) -> None:
        for layer in (self.router, self.up_proj, self.down_proj):
            init_linear_(layer)
        self.router_norm.reset_parameters()

    def _route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        with no_autocast(x.device):
            z = F.linear(x.to(wide), self.router.weight.to(wide))
        return z, self.router_norm(F.relu(z)).to(x.dtype)

    def forward(
        self, x: Tensor, *, state: State | None = None, positions: Tensor | None = None, doc_ids: Tensor | None = None
    ) -> Tensor:
        few = x.shape[0] * x.shape[1] <= self.chunk_size
        if self.inference == "union" and few and state is not None and not torch.is_grad_enabled():
            return self.forward_union(x)
        z, a = self._route(x)
        h = ACTIVATIONS[self.activation](self.up_proj(x)).unflatten(-1, (-1, self.expert_dim))
        y = self.down_proj((h * own_part(a)[..., None]).flatten(-2))
        if not self.training:
            return y
        if (part := current()) is None:
            return self._sparsify(y, z, doc_ids)
        with whole():  # neighbours and chunks go across the cuts
            return self._sparsify(y, part.gather(z), None if doc_ids is None else part.gather(doc_ids))

    def _sparsify(self, y: Tensor, z: Tensor, doc_ids: Tensor | TwoCopies | None) -> Tensor:
        if isinstance(doc_ids, TwoCopies):
            doc_ids = doc_ids.documents(z.shape[0], z.shape[1], z.device)
        record, metrics = recording(self), {}
        if self.locality_coef:
            loss = locality_loss(z, doc_ids)
            y, metrics["locality_loss"] = add_auxiliary_loss(y, self.locality_coef * loss), loss.detach()
        if self.sparsity_coef:
            loss = chunk_sparsity_loss(z, self.chunk_size, doc_ids)
            y, metrics["sparsity_loss"] = add_auxiliary_loss(y, self.sparsity_coef * loss), loss.detach()
        if record:
            active = z.detach() > 0
            spans = {"TLS": 1, "CLS8": 8, f"CLS{self.chunk_size}": self.chunk_size}
            self.metrics = metrics | {name: chunk_level_sparsity(active, n, doc_ids) for name, n in spans.items()}
        return y

    def forward_union(self, x: Tensor) -> Tensor:
        """The same increment for x [B, T, D] in inference, reading only the experts that some token of x uses
        (few tokens: decoding, or the drafts of speculative decoding)."""
        _, a = self._route(x)
        used = (a != 0).flatten(0, -2).any(0).nonzero().squeeze(1).tolist()
        y = torch.zeros_like(x, dtype=state_dtype(x.dtype))
        for e in used:  # slices are views: gathering the rows of all would move the weights three times
            rows = slice(e * self.expert_dim, (e + 1) * self.expert_dim)
            h = ACTIVATIONS[self.activation](linear(x, self.up_proj.weight[rows]))
            y += linear(h * a[..., e : e + 1], self.down_proj.weight[:, rows])
        return y.to(x.dtype)

    @property
    def assumption(self) -> str:
        return "blockffn reads all experts" if self.inference == "union" else ""

    @property
    def expectation(self) -> str:
        return "" if self.assumption else "blockffn: every expert fires at every token"

    def forward_flops(self, batch_size: int, seq_len: int, context_len: int = 0, streaming: bool = False) -> int:
        return linear_flops(batch_size * seq_len, self.router, self.up_proj, self.down_proj)

    def vector_flops(self, batch_size: int, seq_len: int, context_len: int = 0) -> int:
        routing = self.num_experts * (1 + work.RMS)
        activation = 1 if self.activation == "relu" else work.GELU
        return batch_size * seq_len * (routing + self.num_experts * self.expert_dim * (activation + 1))

    def activation_elements(self, batch_size: int, seq_len: int) -> int:
        # x; up (ReLU keeps its result alone), f(up), times the gates; relu(z), its norm, the gates
        tokens, E, width = batch_size * seq_len, self.num_experts, self.num_experts * self.expert_dim
        kept = tokens * (self.dim + (2 if self.activation == "relu" else 3) * width + E)
        kept += self.router_norm.activation_elements(tokens)
        # both sides of neighbours' likeness; relu(z), shares and silence of each expert, factors and place of a token
        return kept + tokens * (2 * E * bool(self.locality_coef) + (3 * E + 4) * bool(self.sparsity_coef))

    def parallel_plan(self) -> ParallelPlan:
        plan = {"router": "replicate", "router_norm": "replicate", "up_proj": "column", "down_proj": "row"}
        return ParallelPlan(plan, units=self.num_experts, context="token")
