"""Time mix of RWKV-7 "Goose": each head's memory is erased along one learned key and decays per channel.
Peng et al. 2025, arXiv:2503.14456."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.blocks.grafting import memories, take, value_scale
from zoo.blocks.recurrent import LinearState, default_heads, previous, wide
from zoo.contract import Block, ParallelPlan, State, linear_flops, refuse_packed_streaming, state_dtype
from zoo.kernels import work
from zoo.kernels.dispatch import check_backend
from zoo.kernels.dplr import dplr
from zoo.kernels.dplr import flops as dplr_flops
from zoo.kernels.linear import Linear
from zoo.registry import register
from zoo.row import delayed
from zoo.schema import NonNegativeInt, PositiveInt
from zoo.segments import handed_on

# power p of the initial mixing weight of each branch, 1 - (i / D)^(p (1 - l / L))
MIX_POWERS = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}


def token_shift(x: Tensor, last: Tensor | None, doc_ids: Tensor | None) -> Tensor:
    """The token before each token of x [B, T, D]: `last` [B, D] (or zero) before the first, zero before a document."""
    return delayed(x, last, doc_ids)


def mixing_weights(dim: int, power: float, like: Tensor) -> Tensor:
    """1 - (i / dim)^power for the channels i."""
    return 1 - (torch.arange(dim, device=like.device, dtype=wide(like).dtype) / dim) ** power


class LoRA(nn.Module):
    """W_2 f(W_1 x) + bias, W_1 of a few rows; `lora` holds W_1, f and W_2."""

    def __init__(self, dim: int, out: int, rank: int, activation: nn.Module, *, bias: bool = True, **factory: Any):
        super().__init__()
        self.lora = nn.Sequential(
            Linear(dim, rank, bias=False, **factory), activation, Linear(rank, out, bias=bias, **factory)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.lora(x)

    def layers(self) -> tuple[nn.Linear, nn.Linear]:
        """Its two linear layers."""
        return self.lora[0], self.lora[2]  # type: ignore[return-value]

    def reset(self, bias: Tensor | None = None) -> None:
        """Only the bias speaks at first."""
        first, second = self.layers()
        with torch.no_grad():
            first.weight.zero_()
            # drawn in single precision or better: half precision has no QR
            second.weight.copy_(nn.init.orthogonal_(torch.empty_like(wide(second.weight)), gain=0.1))
            if bias is not None:
                second.bias.copy_(bias)


@dataclass
class ShiftedLinearState(LinearState):
    """memory and shift: [B, D], the last token."""

    shift: Tensor


class HeadNorm(nn.GroupNorm):
    """Each head's channels normed, of as many heads as there are: under tensor parallelism a rank holds some."""

    def forward(self, input: Tensor) -> Tensor:
        heads = input.shape[1] * self.num_groups // self.num_channels
        return F.group_norm(input, heads, self.weight, self.bias, self.eps)


@register(
    "rwkv7",
    kind="mixer",
    paper="arXiv:2503.14456",
    ops=("dplr",),
    state_growth="constant",
    examples=(
        {"chunk_size": 16},
        {"num_heads": 4, "layer_index": 1, "num_layers": 3, "gate_low_rank_dim": 8, "chunk_size": 16},
    ),
)
class RWKV7(Block):
    """RWKV-7 time mix: S_t = (diag(w_t) - (kappa_t * a_t) kappa_t^T) S_{t-1} + k_t v_t^T, o_t = S_t^T r_t.

    x^c = x + (x_prev - x) * mu_c for c in r, w, k, v, a, g; r, k, v = W_c x^c; w = exp(-e^(-1/2) sigmoid(lora_w(x^w)));
    a = sigmoid(lora_a(x^a)); kappa = k * k_k of unit length per head; k <- k * (1 + (a - 1) * k_a), then
    y = W_o ((GroupNorm_head(o) + (r . r_k * k) v) * lora_g(x^g)). lora_w is W_2 tanh(W_1 x) + b, lora_g
    W_2 sigmoid(W_1 x). Names and shapes are those of flash-linear-attention, whose GroupNorm eps is 1e-5 Dh too.
    Layers after the first mix the first layer's value into theirs, v <- v + (v_first - v) * sigmoid(lora_v(x^v)): the
    combinator `value_residual` builds them so and passes v_first=first.value(x, ...), which a block cannot see alone.
    x: [B, T, D] -> y: [B, T, D]; time O(T), state D Dh + D numbers, Dh = D / num_heads (64 where it fits).
    W_o starts at zero; layer_index of num_layers only sets initial values.
    With a = 0 it is linear attention with a decay per key channel.
    Useful: 8 D Dh FLOPs a token for the state: kappa and r read it, two updates change it.
    """

    not_decayed = (*(f"x_{name}" for name in MIX_POWERS), "r_k")

    x_v: nn.Parameter  # set by name, with its five like

    def __init__(
        self,
        dim: int,
        *,
        num_heads: PositiveInt | None = None,
        decay_low_rank_dim: PositiveInt | None = None,
        a_low_rank_dim: PositiveInt | None = None,
        v_low_rank_dim: PositiveInt | None = None,
        gate_low_rank_dim: PositiveInt | None = None,
        value_residual: bool = False,
        layer_index: NonNegativeInt = 0,
        num_layers: PositiveInt = 1,
        chunk_size: PositiveInt = 64,
        kernel: str = "auto",
        device=None,
        dtype=None,
    ):
        super().__init__(dim)
        check_backend("dplr", kernel)
        if layer_index >= num_layers:
            raise ValueError(f"layer_index={layer_index} must be below num_layers={num_layers}")
        self.num_heads = num_heads or default_heads(dim, at_least=1)
        if dim % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} must divide dim={dim}")
        self.head_dim = dim // self.num_heads
        self.layer_index, self.num_layers = layer_index, num_layers
        self.chunk_size, self.kernel = chunk_size, kernel
        factory: dict[str, Any] = {"device": device, "dtype": dtype}

        def rank(factor: float) -> int:
            return max(32, 32 * round(factor * dim**0.5 / 32))

        for name in MIX_POWERS:
            setattr(self, f"x_{name}", nn.Parameter(torch.empty(1, 1, dim, **factory)))
        self.k_k = nn.Parameter(torch.empty(dim, **factory))
        self.k_a = nn.Parameter(torch.empty(dim, **factory))
        self.r_k = nn.Parameter(torch.empty(self.num_heads, self.head_dim, **factory))
        self.r_proj = Linear(dim, dim, bias=False, **factory)
        self.k_proj = Linear(dim, dim, bias=False, **factory)
        self.v_proj = Linear(dim, dim, bias=False, **factory)
        self.o_proj = Linear(dim, dim, bias=False, **factory)
        self.w_lora = LoRA(dim, dim, decay_low_rank_dim or rank(2.5), nn.Tanh(), **factory)
        self.a_lora = LoRA(dim, dim, a_low_rank_dim or rank(2.5), nn.Identity(), **factory)
        self.g_lora = LoRA(dim, dim, gate_low_rank_dim or rank(5), nn.Sigmoid(), bias=False, **factory)
        self.v_lora = LoRA(dim, dim, v_low_rank_dim or rank(1.7), nn.Identity(), **factory) if value_residual else None
        self.g_norm = HeadNorm(self.num_heads, dim, eps=1e-5 * self.head_dim, **factory)

    def projections(self) -> tuple[nn.Linear, ...]:
        """Every linear layer."""
        loras = [m for m in (self.w_lora, self.a_lora, self.g_lora, self.v_lora) if m is not None]
        low_rank = [layer for m in loras for layer in m.layers()]
        return self.r_proj, self.k_proj, self.v_proj, self.o_proj, *low_rank

    @torch.no_grad()
    def from_attention(self, q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> tuple[str, ...]:
        """Take the maps of attention, each with the rows of all heads; the receptance r is the query. No branch mixes
        in the token before, every update is half of a correction, keys are as they are, the gate is 1, and a token has
        no bonus."""
        for name in MIX_POWERS:
            getattr(self, f"x_{name}").zero_()
        self.k_a.zero_()
        self.r_k.zero_()
        fastest = math.exp(-0.5)
        log_decay = (1 / memories(self.head_dim, self.k_k)).clamp(max=0.9 * fastest)
        _, last = self.w_lora.layers()
        last.bias.copy_(torch.logit(log_decay / fastest).repeat(self.num_heads))
        _, last = self.a_lora.layers()
        last.bias.zero_()
        _, last = self.g_lora.layers()  # it reads sigmoid(0) = 1/2 on every channel
        last.weight += 2 / last.in_features - last.weight.mean(1, keepdim=True)
        if len(v) == self.dim:
            self.g_norm.weight.copy_(value_scale(v, self.dim))
        self.g_norm.bias.zero_()
        return take(
            ("r_proj.weight", self.r_proj.weight, q), ("k_proj.weight", self.k_proj.weight, k),
            ("v_proj.weight", self.v_proj.weight, v), ("o_proj.weight", self.o_proj.weight, o),
        )  # fmt: skip

    def reset_parameters(self) -> None:
        D, Dh, like = self.dim, self.head_dim, self.k_k
        depth, ahead = self.layer_index / max(self.num_layers - 1, 1), 1 - self.layer_index / self.num_layers
        channel = torch.arange(D, device=like.device, dtype=wide(like).dtype)
        line = channel / max(D - 1, 1)
        centred = (channel % Dh) * (2 / max(Dh - 1, 1)) - 1  # -1 to 1 in each head
        zigzag, tilt = centred * centred.abs(), line - 0.5
        with torch.no_grad():
            for name, power in MIX_POWERS.items():
                getattr(self, f"x_{name}").copy_(mixing_weights(D, power * ahead, like))
            self.k_k.copy_(0.71 - 0.1 * tilt)
        nn.init.constant_(self.k_a, 1.02)
        nn.init.constant_(self.r_k, -0.04)
        for linear, size in ((self.r_proj, 0.5), (self.k_proj, 0.05), (self.v_proj, 0.5), (self.o_proj, 0.0)):
            nn.init.uniform_(linear.weight, -size * D**-0.5, size * D**-0.5)
        self.w_lora.reset(-6 + 6 * line ** (1 + depth**0.3) + 0.5 + 2.5 * zigzag)
        self.a_lora.reset(-0.19 + 0.3 * zigzag + 0.4 * tilt)
        self.g_lora.reset()
        if self.v_lora is not None:
            self.v_lora.reset(0.73 - 0.4 * tilt)
        nn.init.constant_(self.g_norm.weight, ((self.layer_index + 1) / self.num_layers) ** 0.7)
        nn.init.zeros_(self.g_norm.bias)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))

    def value(self, x: Tensor, *, state: ShiftedLinearState | None = None, doc_ids: Tensor | None = None) -> Tensor:
        """W_v x^v [B, T, D]: what the first layer gives to later ones. With a state: before forward moves it on."""
        before = token_shift(x, None if state is None else previous(state.shift), doc_ids)
        return self.v_proj(torch.addcmul(x, before - x, self.x_v))

    def forward(
        self,
        x: Tensor,
        *,
        state: ShiftedLinearState | None = None,
        positions: Tensor | None = None,
        doc_ids: Tensor | None = None,
        v_first: Tensor | None = None,
    ) -> Tensor:
        refuse_packed_streaming(state, doc_ids)
        if (v_first is None) != (self.v_lora is None):
            raise ValueError("v_first, the first layer's value, goes with value_residual=True and only with it")
        before = token_shift(x, None if state is None else previous(state.shift), doc_ids)
        step = before - x
        x_r, x_w, x_k, x_v, x_a, x_g = (torch.addcmul(x, step, getattr(self, f"x_{name}")) for name in MIX_POWERS)
        r, k, v = self.r_proj(x_r), self.k_proj(x_k), self.v_proj(x_v)
        if v_first is not None and self.v_lora is not None:
            v = torch.lerp(v, v_first, self.v_lora(x_v).sigmoid())
        log_decay = -math.exp(-0.5) * wide(self.w_lora(x_w)).sigmoid()
        a = wide(self.a_lora(x_a)).sigmoid()
        kappa = F.normalize(self._heads(wide(k) * wide(self.k_k)), dim=-1)
        k = wide(k) * (1 + (a - 1) * wide(self.k_a))
        r, k, v = self._heads(r), self._heads(k), self._heads(v)
        o, memory = dplr(
            r,
            k,
            v,
            -kappa,
            kappa * self._heads(a),
            self._heads(log_decay),
            initial_state=None if state is None else previous(state.memory),
            doc_ids=doc_ids,
            chunk_size=self.chunk_size,
            backend=self.kernel,
        )
        if state is not None:
            state.memory.copy_(handed_on(memory))
            state.shift.copy_(handed_on(x[:, -1]))
        o = self.g_norm(o.flatten(0, 1).flatten(1)).view(*x.shape[:2], -1)
        bonus = (r * k * self.r_k).sum(-1, keepdim=True) * v
        y = (o + bonus.flatten(-2)) * self.g_lora(x_g)
        return self.o_proj(y.to(x.dtype))

    def init_state(self, batch_size: int, max_len: int | None = None) -> State:
        like = self.k_k
        shape = (batch_size, self.num_heads, self.head_dim, self.head_dim)
        memory = like.new_zeros(shape, dtype=state_dtype(like.dtype))
        return ShiftedLinearState(memory, like.new_zeros(batch_size, self.dim))

    def state_bytes(self, batch_size: int, max_len: int) -> int:
        memory = self.dim * self.head_dim * state_dtype(self.k_k.dtype).itemsize
        return batch_size * (memory + self.dim * self.itemsize)

    def forward_flops(self, batch_size: int, seq_len: int, context_len: int = 0, streaming: bool = False) -> int:
        return linear_flops(batch_size * seq_len, *self.projections()) + dplr_flops(
            batch_size, seq_len, self.num_heads, self.head_dim, self.head_dim, chunk_size=self.chunk_size
        )

    def useful_flops(self, batch_size: int, seq_len: int, context_len: int = 0) -> int:
        tokens, D = batch_size * seq_len, self.head_dim
        state = work.recurrence(work.DPLR, tokens, self.num_heads, D, D)
        return linear_flops(tokens, *self.projections()) + state

    def vector_flops(self, batch_size: int, seq_len: int, context_len: int = 0) -> int:
        shift = 1 + 2 * len(MIX_POWERS)
        # log w and w; a; kappa; k; kappa a; decay of the state; norm; bonus; gate
        number = shift + 3 + work.SIGMOID + 1 + work.UNIT + 4 + 1 + self.head_dim + work.LAYER + 5 + 1
        number += 0 if self.v_lora is None else work.SIGMOID + 3  # the first layer's value
        return batch_size * seq_len * self.dim * number

    def activation_elements(self, batch_size: int, seq_len: int) -> int:
        # the step and six mixes; r, k, v, the gate of each channel; sigmoid and decay; a; kappa before and after its
        # norm, its negative and its product with a; k's factor less 1, factor and product; r k; o, with bonus and
        # gated; lengths, bonus and statistics of heads; hidden layers; a state every 32 tokens
        hidden = sum(m.layers()[0].out_features for m in (self.w_lora, self.a_lora, self.g_lora))
        states = -(-seq_len // 32) * self.dim * self.head_dim
        return batch_size * (seq_len * (25 * self.dim + 5 * self.num_heads + hidden) + states)

    def parallel_plan(self) -> ParallelPlan:
        loras = [name for name in ("w_lora", "a_lora", "g_lora", "v_lora") if getattr(self, name) is not None]
        column = ["k_k", "k_a", "r_k", "r_proj", "k_proj", "v_proj", "g_norm", *(f"{n}.lora.2" for n in loras)]
        whole = [*(f"x_{name}" for name in MIX_POWERS), *(f"{n}.lora.0" for n in loras)]
        plan = dict.fromkeys(column, "column") | dict.fromkeys(whole, "replicate") | {"o_proj": "row"}
        return ParallelPlan(plan, units=self.num_heads, context="pass_state")
