"""Gated linear attention with one data-dependent decay per head. Yang et al. 2023, arXiv:2312.06635; the layer is that
of flash-linear-attention without its short convolutions."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from zoo.blocks.grafting import decay_logit, memories
from zoo.blocks.linear_mixer import LinearMixer
from zoo.blocks.recurrent import wide
from zoo.contract import ParallelPlan
from zoo.kernels.linear import Linear
from zoo.registry import register
from zoo.schema import PositiveFloat, PositiveInt


@register(
    "simple_gla",
    kind="mixer",
    paper="arXiv:2312.06635",
    ops=("linear_attention",),
    state_growth="constant",
    relations=(
        "simple_gla(gate='none') == gla(gate='none', expand_k=1.0)",
        "simple_gla(gate_logit_normalizer=1.0, num_heads=4) == retention(decay=0.5, rotary=False, "
        "expand_v=1.0, num_heads=4) at gk_proj.weight=0, gk_proj.bias=0",
    ),
    examples=(
        {"chunk_size": 16},
        {"num_heads": 2, "expand_k": 0.5, "gate_logit_normalizer": 1.0, "chunk_size": 8},
        {"gate": "none", "output_gate": False, "chunk_size": 16},
    ),
)
class SimpleGatedLinearAttention(LinearMixer):
    """Linear attention with a scalar gate per head: S_t = exp(g_t) S_{t-1} + k_t v_t^T, o_t = S_t^T q_t / sqrt(Dk).

    g_t = logsigmoid(W_a x_t + b) / gate_logit_normalizer per head; y = W_o (RMSNorm_head(o) * silu(W_g x)).
    Key width is expand_k D, value width expand_v D over all heads. The decay leaves the product of keys and queries, so
    that a chunk is plain matrix products, where `gla` has to cut it in smaller ones.
    x: [B, T, D] -> y: [B, T, D]; time O(T), state H Dk Dv numbers (D^2 / H by default).
    It is `gla` with equal gates in a head; without the gate linear attention, with a constant one `retention`.
    Useful: 4 Dk Dv FLOPs a head and token, and Dk Dv products with the decay.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: PositiveInt = 4,
        expand_k: PositiveFloat = 1.0,
        expand_v: PositiveFloat = 1.0,
        gate: Literal["head", "none"] = "head",
        gate_logit_normalizer: PositiveFloat = 16.0,
        output_gate: bool = True,
        chunk_size: PositiveInt = 64,
        kernel: str = "auto",
        device=None,
        dtype=None,
    ):
        key_dim, value_dim = int(dim * expand_k), int(dim * expand_v)
        if key_dim < num_heads or key_dim % num_heads or value_dim < num_heads or value_dim % num_heads:
            raise ValueError(
                f"num_heads={num_heads} must divide expand_k * dim = {key_dim} and expand_v * dim = {value_dim}"
            )
        super().__init__(
            dim,
            num_heads,
            key_dim // num_heads,
            value_dim // num_heads,
            output_norm=True,
            output_gate=output_gate,
            chunk_size=chunk_size,
            kernel=kernel,
            device=device,
            dtype=dtype,
        )
        self.decay_kind = gate
        self.gate_logit_normalizer = gate_logit_normalizer
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.gk_proj = Linear(dim, num_heads, bias=True, **factory) if gate == "head" else None

    def projections(self) -> tuple[nn.Linear | None, ...]:
        return *super().projections(), self.gk_proj

    def start_decay_(self) -> None:
        if self.gk_proj is not None:
            self.gk_proj.weight.zero_()
            logits = decay_logit(-self.gate_logit_normalizer / memories(self.num_heads, self.gk_proj.bias))
            self.gk_proj.bias.copy_(logits)

    def log_decay(self, x: Tensor) -> Tensor | None:
        return None if self.gk_proj is None else F.logsigmoid(wide(self.gk_proj(x))) / self.gate_logit_normalizer

    @property
    def key_work(self) -> int:
        return 0 if self.gk_proj is None else 3  # log sigmoid, quotient, exponential

    def token_elements(self) -> int:
        return 0 if self.gk_proj is None else 3 * self.num_heads  # logit, what its logsigmoid keeps, decay

    def parallel_plan(self) -> ParallelPlan:
        plan = super().parallel_plan()
        gate = {} if self.gk_proj is None else {"gk_proj": "column"}
        return ParallelPlan({**plan.tensor, **gate}, units=plan.units, context=plan.context)
