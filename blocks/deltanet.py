"""DeltaNet: correct what is stored under the key, once a token or by several Householder products. Schlag et al. 2021,
arXiv:2102.11174, Yang et al. 2024, arXiv:2406.06484, and DeltaProduct, Siems et al. 2025, arXiv:2502.10297."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.blocks.delta_mixer import DeltaMixer
from zoo.blocks.grafting import SMALL, pass_through_
from zoo.blocks.recurrent import ShortConv, default_heads
from zoo.contract import ParallelPlan
from zoo.kernels import work
from zoo.kernels.linear import Linear
from zoo.registry import register
from zoo.schema import NonNegativeInt, PositiveFloat, PositiveInt


@register(
    "deltanet",
    kind="mixer",
    paper="arXiv:2406.06484",
    ops=("delta_rule", "short_conv"),
    state_growth="constant",
    relations=("deltanet(decay='head', output_gate=True) == gated_deltanet(head_dim=16, expand_v=1.0)",),
    examples=(
        {"chunk_size": 16},
        {"num_heads": 2, "num_householder": 3, "allow_neg_eigval": True, "chunk_size": 16},
        {"num_householder": 2, "decay": "head", "expand_v": 2.0, "output_gate": True, "chunk_size": 16},
        {"conv_size": 0, "num_heads": 3, "head_dim": 8, "chunk_size": 24},
    ),
)
class DeltaNet(DeltaMixer):
    """DeltaNet: S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T, o_t = S_t^T q_t / sqrt(Dk).

    q, k, v = silu(conv(W x)), q and k of unit length per head; beta = sigmoid(W_b x) per head, so that the transition
    has the eigenvalue 1 - beta in (0, 1); `allow_neg_eigval` doubles beta, and it reaches down to -1, a Householder
    reflection: what parity and other state tracking need (arXiv:2411.12537).
    num_householder = n > 1 is DeltaProduct: a token writes n keys with a value and a beta each, one after the other (a
    product of n Householder matrices), then its query reads; rows of k_proj, v_proj, b_proj and their convolutions go
    [n, heads, width]. decay='head' forgets by a scalar before the first of them (Gated DeltaProduct).
    y = W_o RMSNorm_head(o), times silu(W_g x) with `output_gate`. A value head is expand_v head_dim wide.
    x: [B, T, D] -> y: [B, T, D]; time O(n T), state H Dk Dv numbers and the last W-1 inputs of the convolutions.
    On orthonormal keys linear attention of beta v; with n = 1 and decay Gated DeltaNet.
    Useful: (4 n + 2) Dk Dv FLOPs a head and token: each update reads and writes, the query reads.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: PositiveInt | None = None,
        head_dim: PositiveInt | None = None,
        expand_v: PositiveFloat = 1.0,
        num_householder: PositiveInt = 1,
        decay: Literal["none", "head"] = "none",
        conv_size: NonNegativeInt = 4,
        output_gate: bool = False,
        allow_neg_eigval: bool = False,
        norm_eps: PositiveFloat = 1e-5,
        chunk_size: PositiveInt = 64,
        kernel: str = "auto",
        device=None,
        dtype=None,
    ):
        heads = num_heads or default_heads(dim, width=128)
        key_dim = head_dim or max(dim // heads, 1)
        value_dim = int(expand_v * key_dim)
        if value_dim < 1:
            raise ValueError(f"expand_v={expand_v} must leave a value channel at head_dim={key_dim}")
        super().__init__(
            dim,
            heads,
            key_dim,
            value_dim,
            updates=num_householder,
            decay=decay,
            conv_size=conv_size,
            gate_activation="silu",
            allow_neg_eigval=allow_neg_eigval,
            norm_eps=norm_eps,
            chunk_size=chunk_size,
            kernel=kernel,
            device=device,
            dtype=dtype,
        )
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        if conv_size:
            self.q_conv1d, self.k_conv1d, self.v_conv1d = (ShortConv(c, conv_size, **factory) for c in self.widths)
        self.output_gate = output_gate
        self.g_proj = Linear(dim, heads * value_dim, bias=False, **factory) if output_gate else None

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.conv_size:
            for conv in (self.q_conv1d, self.k_conv1d, self.v_conv1d):
                conv.reset_parameters()

    def start_convolutions_(self) -> None:
        if self.conv_size:
            for conv in (self.q_conv1d, self.k_conv1d, self.v_conv1d):
                pass_through_(conv, SMALL)

    def conv_weight(self) -> Tensor:
        return torch.cat([self.q_conv1d.weight, self.k_conv1d.weight, self.v_conv1d.weight])

    def gate(self, x: Tensor) -> Tensor | None:
        return None if self.g_proj is None else self.g_proj(x)

    def vector_flops(self, batch_size: int, seq_len: int, context_len: int = 0) -> int:
        gated = 0 if self.g_proj is None else self.g_proj.out_features
        return super().vector_flops(batch_size, seq_len) + batch_size * seq_len * gated * (work.SILU + 1)

    def mix(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        log_decay: Tensor | None,
        memory: Tensor | None,
        doc_ids: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        n = self.updates
        if n == 1:
            return super().mix(q, k, v, beta, log_decay, memory, doc_ids)
        # the sequence of updates, n to a token: the first forgets, the last reads
        k, v, beta = (t.unflatten(2, (n, self.num_heads)).flatten(1, 2) for t in (k, v, beta))
        q = F.pad(q[:, :, None], (0, 0, 0, 0, n - 1, 0)).flatten(1, 2)
        if log_decay is not None:
            log_decay = F.pad(log_decay[:, :, None], (0, 0, 0, n - 1)).flatten(1, 2)
        if doc_ids is not None:
            doc_ids = doc_ids.repeat_interleave(n, 1)
        o, memory = super().mix(q, k, v, beta, log_decay, memory, doc_ids)
        return o[:, n - 1 :: n], memory

    def parallel_plan(self) -> ParallelPlan:
        if self.updates > 1:
            reason = "rows of k_proj, v_proj and b_proj go update by update, so heads are not split as they lie"
            return ParallelPlan(context="pass_state", reason=reason)
        names = ("q_proj", "k_proj", "v_proj", "b_proj", "g_proj", "a_proj", "A_log", "dt_bias")
        convs = ("q_conv1d", "k_conv1d", "v_conv1d")
        plan = {name: "column" for name in (*names, *convs) if getattr(self, name, None) is not None}
        plan |= {"o_norm": "replicate", "o_proj": "row"}
        return ParallelPlan(plan, units=self.num_heads, context="pass_state")
