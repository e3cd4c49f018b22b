"""Kimi Delta Attention: every key channel forgets at its own rate, then what is stored under the key is corrected.
Kimi Team 2025, arXiv:2510.26692."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from zoo.blocks.delta_mixer import DeltaMixer
from zoo.blocks.grafting import SMALL, inverse_softplus, memories, pass_through_
from zoo.blocks.recurrent import ShortConv, default_heads, reset_softplus_decay_, softplus_decay, wide
from zoo.contract import ParallelPlan
from zoo.kernels import work
from zoo.kernels.linear import Linear
from zoo.registry import register
from zoo.schema import NonNegativeInt, PositiveFloat, PositiveInt, Range


class ForgetGate(nn.Module):
    """Log-decay of every key channel [B, T, H, Dk] from a low-rank map, f = W_2 W_1 x + dt_bias:
    -exp(A_log) softplus(f), or lower_bound * sigmoid(exp(A_log) f) in (lower_bound, 0)."""

    not_decayed = ("A_log",)

    def __init__(self, dim: int, num_heads: int, head_dim: int, lower_bound: float | None, device=None, dtype=None):
        super().__init__()
        self.lower_bound = lower_bound
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.f_a_proj = Linear(dim, head_dim, bias=False, **factory)
        self.f_b_proj = Linear(head_dim, num_heads * head_dim, bias=False, **factory)
        self.dt_bias = nn.Parameter(torch.empty(num_heads * head_dim, **factory))
        self.A_log = nn.Parameter(torch.empty(1, 1, num_heads, 1, **factory))

    def reset_parameters(self) -> None:
        reset_softplus_decay_(self.A_log, self.dt_bias, 1.0, 16.0)
        if self.lower_bound is not None:
            nn.init.zeros_(self.A_log)

    def start_(self) -> None:
        """Constant decays, their memories from short to long over the channels of a head."""
        heads = self.A_log.shape[2]
        rate = 1 / memories(len(self.dt_bias) // heads, self.dt_bias)
        self.f_b_proj.weight.zero_()
        self.A_log.zero_()
        if self.lower_bound is None:
            bias = inverse_softplus(rate)
        else:
            bias = torch.logit((-rate / self.lower_bound).clamp(max=0.9))
        self.dt_bias.copy_(bias.repeat(heads))

    def forward(self, x: Tensor) -> Tensor:
        heads = (self.A_log.shape[2], -1)
        f, bias = self.f_b_proj(self.f_a_proj(x)).unflatten(-1, heads), self.dt_bias.unflatten(0, heads)
        if self.lower_bound is None:
            return softplus_decay(f, self.A_log, bias)
        return self.lower_bound * (wide(self.A_log).exp() * (wide(f) + wide(bias))).sigmoid()


@register(
    "kda",
    kind="mixer",
    paper="arXiv:2510.26692",
    ops=("delta_rule", "short_conv"),
    state_growth="constant",
    relations=(
        "kda(decay='head', conv_size=0, output_gate=False) == gated_deltanet(head_dim=16, expand_v=1.0, conv_size=0, "
        "output_gate=False)",
        "kda(decay='none', conv_size=0, output_gate=False) == deltanet(conv_size=0)",
        "kda() == kda(decay='none') at forget_gate.A_log=-inf",
        "kda(conv_size=0, output_gate=False) == gated_deltanet(head_dim=16, expand_v=1.0, conv_size=0, "
        "output_gate=False) at forget_gate.f_b_proj.weight=0, forget_gate.dt_bias=-2, forget_gate.A_log=0.5, "
        "a_proj.weight=0, dt_bias=-2, A_log=0.5",
        "kda(gate_lower_bound=-5.0) == kda(decay='none') at forget_gate.dt_bias=-inf",
    ),
    examples=(
        {"chunk_size": 16},
        {"num_heads": 2, "head_dim": 8, "gate_lower_bound": -5.0, "allow_neg_eigval": True, "chunk_size": 16},
        {"decay": "head", "chunk_size": 16},
        {"decay": "none", "conv_size": 0, "output_gate": False, "chunk_size": 24},
    ),
)
class KimiDeltaAttention(DeltaMixer):
    """KDA: S_t = (I - beta_t k_t k_t^T) diag(alpha_t) S_{t-1} + beta_t k_t v_t^T, o_t = S_t^T q_t / sqrt(Dk).

    q, k, v = silu(conv(W x)), q and k of unit length per head; beta = sigmoid(W_b x) per head;
    alpha = exp(-exp(A_log) softplus(W_2 W_1 x + dt_bias)) per key channel, or at least exp(gate_lower_bound) with
    log alpha = gate_lower_bound * sigmoid(exp(A_log) (W_2 W_1 x + dt_bias));
    y = W_o (RMSNorm_head(o) * sigmoid(U_2 U_1 x)), both low-rank maps of rank head_dim = Dk = Dv.
    x: [B, T, D] -> y: [B, T, D]; time O(T), state H Dk^2 numbers and the last W-1 inputs of the convolution.
    decay='head' is Gated DeltaNet, decay='none' DeltaNet; beta = 0 writes nothing and y = 0.
    Parameters and layouts are those of Kimi Linear in Hugging Face: the rows of conv1d are those of q, k and v.
    Useful: 6 Dk^2 FLOPs a head and token (S k, the update, S q), and Dk^2 products with the decay.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: PositiveInt | None = None,
        head_dim: PositiveInt | None = None,
        decay: Literal["channel", "head", "none"] = "channel",
        gate_lower_bound: Annotated[float, Range(ge=-5, lt=0)] | None = None,
        conv_size: NonNegativeInt = 4,
        output_gate: bool = True,
        allow_neg_eigval: bool = False,
        norm_eps: PositiveFloat = 1e-5,
        chunk_size: PositiveInt = 64,
        kernel: str = "auto",
        device=None,
        dtype=None,
    ):
        if gate_lower_bound is not None and decay != "channel":
            raise ValueError(f"gate_lower_bound={gate_lower_bound} needs decay='channel', got decay={decay!r}")
        heads = num_heads or default_heads(dim, width=128)
        width = head_dim or max(dim // heads, 1)
        super().__init__(
            dim,
            heads,
            width,
            width,
            decay=decay,
            conv_size=conv_size,
            gate_activation="sigmoid",
            allow_neg_eigval=allow_neg_eigval,
            norm_eps=norm_eps,
            chunk_size=chunk_size,
            kernel=kernel,
            device=device,
            dtype=dtype,
        )
        self.output_gate = output_gate
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        if conv_size:
            self.conv1d = ShortConv(sum(self.widths), conv_size, **factory)
        if decay == "channel":
            self.forget_gate = ForgetGate(dim, heads, width, gate_lower_bound, **factory)
        if output_gate:
            self.g_a_proj = Linear(dim, width, bias=False, **factory)
            self.g_b_proj = Linear(width, heads * width, bias=False, **factory)

    def start_convolutions_(self) -> None:
        if self.conv_size:
            pass_through_(self.conv1d, SMALL)

    @torch.no_grad()
    def from_attention(self, q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> tuple[str, ...]:
        """As for every delta rule; the memories of the channels of a head differ."""
        if self.decay == "channel":
            self.forget_gate.start_()
        return super().from_attention(q, k, v, o)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.conv_size:
            self.conv1d.reset_parameters()
        if self.decay == "channel":
            self.forget_gate.reset_parameters()

    def conv_weight(self) -> Tensor:
        return self.conv1d.weight

    def log_decay(self, x: Tensor) -> Tensor | None:
        return self.forget_gate(x) if self.decay == "channel" else super().log_decay(x)

    def gate(self, x: Tensor) -> Tensor | None:
        return self.g_b_proj(self.g_a_proj(x)) if self.output_gate else None

    def vector_flops(self, batch_size: int, seq_len: int, context_len: int = 0) -> int:
        numbers = batch_size * seq_len * self.num_heads * self.key_dim
        gate = work.SIGMOID + 1 if self.output_gate else 0
        bounded = self.decay == "channel" and self.forget_gate.lower_bound is not None  # one product more
        return super().vector_flops(batch_size, seq_len) + numbers * (gate + bounded)

    def activation_elements(self, batch_size: int, seq_len: int) -> int:
        # what lies between the two maps of the decay and of the gate
        ranks = self.key_dim * ((self.decay == "channel") + self.output_gate)
        return super().activation_elements(batch_size, seq_len) + batch_size * seq_len * ranks

    def parallel_plan(self) -> ParallelPlan:
        return ParallelPlan(
            context="pass_state",
            reason="conv1d stacks q, k and v, and A_log has its heads in the third dimension, so rows are not split as "
            "they lie",
        )
