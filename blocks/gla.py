"""Gated linear attention: every key channel forgets at its own, data-dependent rate. Yang et al. 2023,
arXiv:2312.06635."""

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
    "gla",
    kind="mixer",
    paper="arXiv:2312.06635",
    ops=("linear_attention",),
    state_growth="constant",
    relations=(
        "gla(gate='none') == linear_attention(num_heads=4, head_dim=8, value_head_dim=16, feature_map='identity', "
        "normalize=False, output_norm=True, output_gate=True)",
        "gla() == gla(gate='none') at gk_proj.1.bias=inf",
        "gla(expand_k=1.0) == simple_gla() at gk_proj.1.weight=0, gk_proj.1.bias=-1, gk_proj.weight=0, gk_proj.bias=-1",
    ),
    examples=(
        {"chunk_size": 16},
        {"num_heads": 2, "expand_k": 1.0, "gate_logit_normalizer": 1.0, "chunk_size": 8},
        {"gate": "none", "output_gate": False, "chunk_size": 16},
    ),
)
class GatedLinearAttention(LinearMixer):
    """Gated linear attention: S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T, o_t = S_t^T q_t / sqrt(Dk).

    g_t = logsigmoid(W_2 W_1 x_t + b) / gate_logit_normalizer per key channel, W_1 of rank `gate_low_rank_dim`;
    y = W_o (RMSNorm_head(o) * silu(W_g x)). Key width is expand_k D, value width expand_v D over all heads.
    x: [B, T, D] -> y: [B, T, D]; time O(T), state H Dk Dv numbers (D^2 / 2H by default).
    Without the gate it is linear attention; with equal gates in a head it is a scalar-decay mixer.
    Useful: 4 Dk Dv FLOPs a head and token, and Dk Dv products with the decay.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: PositiveInt = 4,
        expand_k: PositiveFloat = 0.5,
        expand_v: PositiveFloat = 1.0,
        gate: Literal["channel", "none"] = "channel",
        gate_low_rank_dim: PositiveInt = 16,
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
        self.gk_proj = None
        if gate == "channel":
            self.gk_proj = nn.Sequential(
                Linear(dim, gate_low_rank_dim, bias=False, **factory),
                Linear(gate_low_rank_dim, key_dim, bias=True, **factory),
            )

    def gate_layers(self) -> list[nn.Linear]:
        """Linear layers of the decay's low-rank map, none with gate='none'."""
        return [m for m in self.gk_proj or () if isinstance(m, nn.Linear)]

    def projections(self) -> tuple[nn.Linear | None, ...]:
        return *super().projections(), *self.gate_layers()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for linear in (self.q_proj, self.k_proj, *self.gate_layers()):
            nn.init.xavier_uniform_(linear.weight, gain=2**-2.5)

    def start_decay_(self) -> None:
        for linear in self.gate_layers()[1:]:
            linear.weight.zero_()
            logits = decay_logit(-self.gate_logit_normalizer / memories(self.key_dim, linear.bias))
            linear.bias.copy_(logits.repeat(self.num_heads))

    def log_decay(self, x: Tensor) -> Tensor | None:
        if self.gk_proj is None:
            return None
        return (F.logsigmoid(wide(self.gk_proj(x))) / self.gate_logit_normalizer).unflatten(-1, (-1, self.key_dim))

    @property
    def key_work(self) -> int:
        return 0 if self.gk_proj is None else 3 * self.key_dim  # log sigmoid, quotient, exponential

    def token_elements(self) -> int:
        # the low rank; the gate's logit, what its logsigmoid keeps, the decay
        return sum(m.in_features + 3 * m.out_features for m in self.gate_layers()[1:])

    def parallel_plan(self) -> ParallelPlan:
        plan = super().parallel_plan()
        gate = {"gk_proj.0": "replicate", "gk_proj.1": "column"} if self.gk_proj is not None else {}
        return ParallelPlan({**plan.tensor, **gate}, units=plan.units, context=plan.context)
