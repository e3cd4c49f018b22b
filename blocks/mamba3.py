"""Mamba-3: trapezoidal steps, complex states, several inputs and outputs a head. Lahoti et al. 2026, arXiv:2603.15569.

With E = expand D channels in H heads of P, N states, rank R and * elementwise:
    [z; x; B; C; dt; A; trap; angle] = W_in input;  delta = softplus(dt + dt_bias);  lambda = sigmoid(trap)
    theta_t = theta_{t-1} + pi tanh(angle_t) delta_t;  B, C <- rotate(rms(.) + bias, theta_t);  x_r = x * mimo_x_r
    alpha = exp(-softplus(A) delta);  beta = (1 - lambda) delta alpha;  gamma = lambda delta
    S_t = alpha_t S_{t-1} + sum_r beta_t B_{t-1,r} x_{t-1,r}^T + gamma_t B_{t,r} x_{t,r}^T
    y_r = S_t^T C_{t,r} + D x_r;  output = W_out sum_r mimo_o_r * y_r * silu(z * mimo_z_r)

A token thus enters the memory twice: in its own step and, as the left end of the trapezoid, in the next one, by the
decay of that step. So S_t + (1 - lambda_{t+1}) delta_{t+1} B_t x_t^T is a plain decayed sum, linear attention with
every token weighted by lambda_t delta_t + (1 - lambda_{t+1}) delta_{t+1}; what a token has read too much of itself is
taken off again, so that token t + 1 shows in y_t by rounding at most. The R pairs of a token are R tokens of that
recurrence, of which only the first decays.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.blocks.grafting import inverse_softplus, memories, take, value_scale
from zoo.blocks.norms import RMSNorm
from zoo.blocks.recurrent import previous, wide
from zoo.contract import Block, ParallelPlan, State, init_linear_, linear_flops, refuse_packed_streaming, state_dtype
from zoo.kernels import work
from zoo.kernels.dispatch import check_backend
from zoo.kernels.linear import Linear
from zoo.kernels.linear_attention import INTERVAL, linear_attention
from zoo.kernels.linear_attention import flops as linear_attention_flops
from zoo.kernels.precision import no_autocast
from zoo.registry import register
from zoo.row import advanced, earlier
from zoo.schema import PositiveFloat, PositiveInt, Range
from zoo.segments import handed_on

SLOWEST = 1e-4  # -A is at least this
STEPS = (1e-3, 1e-1)  # delta at initialisation, log-uniform


@dataclass
class Mamba3State(State):
    """angle: [B, H, S] in [0, 2 pi); ssm: [B, H, N, P]; the last token's B: [B, R, H, N] and x: [B, H, P]. The N
    channels are rotated and in the order of `rotate`."""

    angle: Tensor
    ssm: Tensor
    B: Tensor
    x: Tensor


@register(
    "mamba3",
    kind="mixer",
    paper="arXiv:2603.15569",
    ops=("linear_attention",),
    state_growth="constant",
    relations=(
        "mamba3(chunk_size=16) == mamba3(chunk_size=64)",
        "mamba3(mimo_rank=2, head_dim=16, state_dim=8, rope_fraction=0.0) == "
        "mamba3(head_dim=16, state_dim=8, rope_fraction=0.0) at mimo_x=0, mimo_x[:, 0]=1, "
        "mimo_z=1, mimo_o=0, mimo_o[:, 0]=1, "
        "in_proj.weight[:264]=in_proj.weight[:264], in_proj.weight[272:280]=in_proj.weight[264:272], "
        "in_proj.weight[288:]=in_proj.weight[272:], B_bias[:, :1]=B_bias, C_bias[:, :1]=C_bias",
        "mamba3(trapezoidal=False, rope_fraction=0.0, head_dim=16, state_dim=8, num_groups=2) == "
        "mamba2(head_dim=16, state_dim=8, num_groups=2, gated_norm=False) at conv1d=identity, "
        "B_norm=identity, C_norm=identity, B_bias=0, C_bias=0, in_proj.weight[:296]=in_proj.weight, "
        "in_proj.weight[296:]=0, A_log=-0.36651292058166435",
    ),
    examples=(
        {"state_dim": 16, "chunk_size": 16},
        {"state_dim": 16, "mimo_rank": 4, "chunk_size": 16},
        {"head_dim": 16, "state_dim": 8, "num_groups": 2, "mimo_rank": 2, "output_norm": True, "chunk_size": 8},
        {"head_dim": 32, "expand": 1, "state_dim": 6, "rope_fraction": 1.0, "output_norm": True, "chunk_size": 16},
        {"state_dim": 16, "rope_fraction": 0.0, "trapezoidal": False, "chunk_size": 16},
    ),
)
class Mamba3(Block):
    """Mamba-3: S_t = a_t S_{t-1} + (1 - l_t) d_t a_t B_{t-1} x_{t-1}^T + l_t d_t B_t x_t^T, y_t = S_t^T C_t + D x_t.

    a = exp(d A), d the step, l in (0, 1) the share of the step's right end: 1 is Euler's rule, 1/2 the trapezoid. B and
    C are normed, biased per head and rotated by angles that add up d-scaled, data-dependent turns, so that the states
    are complex; there is no convolution. Of the N states, rope_fraction N are rotated: none at 0, a real recurrence.
    mimo_rank R > 1 writes R pairs (B_r, x_r) and reads R outputs a head and token, R times the arithmetic on a state
    of the same size. Pairs of rotated states are neighbours at R = 1 and N / 2 apart otherwise, as in the authors'
    code. output_norm: an RMS norm per head, before the gate. trapezoidal=False is the paper's ablation, Euler's rule:
    l = 1, and in_proj has no rows for it.

    x: [B, T, D] -> y: [B, T, D]; rows of in_proj are [z; x; B; C; dt; A; trap; angle], B and C by rank, then group.
    Time O(T), as matrix products in chunks of chunk_size, which changes speed only; state E N + E + H (R N + S)
    numbers, S = rope_fraction N / 2 angles.
    By Euler's rule and without rotation, norm and bias of B and C it is Mamba-2 without its convolution.
    Useful: 4 R E N FLOPs a token for the state, at R > 1 and pairs within it, and E N products with the decay.
    """

    not_decayed = ("B_bias", "C_bias")

    def __init__(
        self,
        dim: int,
        *,
        head_dim: PositiveInt | None = None,
        state_dim: PositiveInt = 128,
        num_groups: PositiveInt = 1,
        expand: PositiveInt = 2,
        mimo_rank: PositiveInt = 1,
        rope_fraction: Annotated[float, Range(ge=0, le=1)] = 0.5,
        trapezoidal: bool = True,
        output_norm: bool = False,
        norm_eps: PositiveFloat = 1e-5,
        chunk_size: PositiveInt = 64,
        kernel: str = "auto",
        device=None,
        dtype=None,
    ):
        super().__init__(dim)
        check_backend("linear_attention", kernel)
        self.inner, self.state_dim, self.num_groups, self.rank = expand * dim, state_dim, num_groups, mimo_rank
        self.head_dim = head_dim or math.gcd(self.inner, 64)
        self.num_heads = self.inner // self.head_dim
        if self.num_heads * self.head_dim != self.inner:
            raise ValueError(f"head_dim={head_dim} must divide expand * dim = {self.inner}")
        if self.num_heads % num_groups:
            raise ValueError(f"num_groups={num_groups} must divide the number of heads, {self.num_heads}")
        self.num_angles = int(state_dim * rope_fraction) // 2
        if self.num_angles and state_dim % 2:
            raise ValueError(f"state_dim={state_dim} must be even, as states are rotated in pairs; or rope_fraction=0")
        self.chunk_size, self.kernel = chunk_size, kernel
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        H, R, N = self.num_heads, mimo_rank, state_dim
        self.rows = [self.inner, self.inner, R * num_groups * N, R * num_groups * N, H, H]
        self.rows += [H if trapezoidal else 0, self.num_angles]
        self.trapezoidal = trapezoidal
        self.in_proj = Linear(dim, sum(self.rows), bias=False, **factory)
        self.dt_bias = nn.Parameter(torch.empty(H, **factory))
        self.B_bias = nn.Parameter(torch.empty(H, R, N, **factory))
        self.C_bias = nn.Parameter(torch.empty(H, R, N, **factory))
        self.B_norm = RMSNorm(N, eps=norm_eps, **factory)
        self.C_norm = RMSNorm(N, eps=norm_eps, **factory)
        if R > 1:
            self.mimo_x = nn.Parameter(torch.empty(H, R, self.head_dim, **factory))
            self.mimo_z = nn.Parameter(torch.empty(H, R, self.head_dim, **factory))
            self.mimo_o = nn.Parameter(torch.empty(H, R, self.head_dim, **factory))
        self.D = nn.Parameter(torch.empty(H, **factory))
        self.norm = RMSNorm(self.inner, eps=norm_eps, **factory) if output_norm else None
        self.out_proj = Linear(self.inner, dim, bias=False, **factory)

    @staticmethod
    def like_attention(dim: int, num_heads: int, num_kv_heads: int, head_dim: int) -> dict[str, Any]:
        """Options with which a head's state is its keys times its values, where all heads are a multiple of dim wide;
        else its own."""
        inner = num_heads * head_dim
        if inner % dim:
            return {"head_dim": None}
        made = {"head_dim": head_dim, "state_dim": head_dim, "num_groups": num_heads, "output_norm": True}
        return made | {"expand": inner // dim}

    @torch.no_grad()
    def from_attention(self, q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> tuple[str, ...]:
        """Take C from the queries, B from the keys, x from the values, each with the rows of all heads. Nothing is
        rotated at first, decays are constant, and there is no skip. The gate has no bias with which it could be open: z
        stays as it is drawn."""
        _, x, B, C, *gates = self.in_proj.weight.split(self.rows)
        for rows in gates:
            rows.zero_()
        # -A = softplus(0) = log 2
        self.dt_bias.copy_(inverse_softplus(1 / (math.log(2) * memories(self.num_heads, self.dt_bias))))
        for bias in (self.B_bias, self.C_bias, self.D):
            bias.zero_()
        if self.norm is not None and len(v) == self.inner:
            self.norm.weight.copy_(value_scale(v, self.inner))
        return take(
            ("in_proj.weight", x, v), ("in_proj.weight", B, k), ("in_proj.weight", C, q),
            ("out_proj.weight", self.out_proj.weight, o),
        )  # fmt: skip

    def reset_parameters(self) -> None:
        init_linear_(self.in_proj)
        init_linear_(self.out_proj)
        nn.init.uniform_(self.dt_bias, math.log(STEPS[0]), math.log(STEPS[1]))
        with torch.no_grad():
            step = self.dt_bias.exp()
            self.dt_bias.copy_(step + torch.log(-torch.expm1(-step)))  # inverse of softplus
        for one in (self.B_bias, self.C_bias, self.B_norm.weight, self.C_norm.weight, self.D):
            nn.init.ones_(one)
        if self.rank > 1:
            nn.init.constant_(self.mimo_x, 1 / self.rank)
            nn.init.ones_(self.mimo_z)
            nn.init.constant_(self.mimo_o, 1 / self.rank)
        if self.norm is not None:
            nn.init.ones_(self.norm.weight)

    def forward(
        self,
        x: Tensor,
        *,
        state: Mamba3State | None = None,
        positions: Tensor | None = None,
        doc_ids: Tensor | None = None,
    ) -> Tensor:
        refuse_packed_streaming(state, doc_ids)
        z, u, B, C, dt, A, trap, angle = self.in_proj(x).split(self.rows, -1)
        delta = F.softplus(wide(dt) + wide(self.dt_bias))
        log_decay = delta * (-F.softplus(wide(A))).clamp(max=-SLOWEST)
        gamma = torch.sigmoid(wide(trap)) * delta if self.trapezoidal else delta
        late = delta - gamma  # beta / alpha, the weight that a token leaves to the one before it
        ahead = advanced(late, doc_ids)
        B, C = self._heads(B, self.B_norm, self.B_bias), self._heads(C, self.C_norm, self.C_bias)
        if self.num_angles:
            turn = math.pi * torch.tanh(wide(angle))[:, :, None] * delta[..., None]
            theta = turn.cumsum(1, dtype=torch.float64)  # many turns add up, of which the fraction counts
            theta = theta + (earlier(theta[:, -1]) if state is None else state.angle)[:, None]
            theta = torch.remainder(theta, 2 * math.pi).to(delta.dtype)
            cos, sin = theta.cos()[:, :, None], theta.sin()[:, :, None]
            B, C = (rotate(t, cos, sin, neighbours=self.rank == 1) for t in (B, C))
            if state is not None:
                state.angle.copy_(handed_on(theta[:, -1]))
        B, C = B.to(x.dtype), C.to(x.dtype)
        u = wide(u).unflatten(-1, (self.num_heads, -1))
        v = self._spread(u)
        with no_autocast(x.device):
            memory = None
            if state is not None:  # the last token's part in this segment's first step
                left = late[:, 0, None, :, None] * self._spread(previous(state.x))
                memory = state.ssm + torch.einsum("brhn,brhp->bhnp", previous(state.B), left)
            o, memory = linear_attention(
                C.flatten(1, 2),
                B.flatten(1, 2),
                ((gamma + ahead)[:, :, None, :, None] * v).flatten(1, 2),
                F.pad(log_decay[:, :, None], (0, 0, 0, self.rank - 1)).flatten(1, 2),
                initial_state=memory,
                doc_ids=None if doc_ids is None else doc_ids.repeat_interleave(self.rank, 1),
                chunk_size=self.chunk_size,
                backend=self.kernel,
            )
            y = o.unflatten(1, (-1, self.rank)) + self._within(B, C, v, gamma, ahead)
        if state is not None:
            state.ssm.copy_(handed_on(memory))
            state.B.copy_(handed_on(B[:, -1]))
            state.x.copy_(handed_on(u[:, -1]))
        return self.out_proj(self._read_out(y, wide(z)).to(x.dtype))

    def _heads(self, t: Tensor, norm: RMSNorm, bias: Tensor) -> Tensor:
        """Rows of B or C [B, T, R G N], normed, for each head [B, T, R, H, N] with the head's bias."""
        groups = norm(wide(t).unflatten(-1, (self.rank, self.num_groups, 1, self.state_dim)))
        bias = wide(bias).transpose(0, 1).unflatten(1, (self.num_groups, -1))
        return (groups + bias).flatten(-3, -2)

    def _spread(self, u: Tensor) -> Tensor:
        """The R inputs [..., R, H, P] of heads [..., H, P]."""
        u = u.unsqueeze(-3)
        return u if self.rank == 1 else u * wide(self.mimo_x).transpose(0, 1)

    def _within(self, B: Tensor, C: Tensor, v: Tensor, gamma: Tensor, ahead: Tensor) -> Tensor:
        """What y of a token takes from the token itself beyond what linear attention gave it, skip included.

        Output r should have read gamma of each pair s, and has read gamma + ahead of those with s <= r.
        """
        B, C, D = wide(B), wide(C), wide(self.D)
        if self.rank == 1:
            return (D - ahead * (B * C).sum(-1).squeeze(2))[:, :, None, :, None] * v
        read = torch.ones(self.rank, self.rank, dtype=gamma.dtype, device=gamma.device).tril()
        missed = gamma[..., None, None] - (gamma + ahead)[..., None, None] * read
        pairs = C.transpose(2, 3) @ B.permute(0, 1, 3, 4, 2)  # [B, T, H, R, R]
        return torch.addcmul(((missed * pairs) @ v.transpose(2, 3)).transpose(2, 3), D[:, None], v)

    def _read_out(self, y: Tensor, z: Tensor) -> Tensor:
        """[B, T, E] of the R outputs y [B, T, R, H, P] and the gate z [B, T, E]."""
        z = z.unflatten(-1, (1, self.num_heads, -1))
        if self.norm is not None:
            heads = self.norm.weight.unflatten(0, (self.num_heads, -1))
            y = F.rms_norm(y, y.shape[-1:], eps=self.norm.eps) * wide(heads)
        if self.rank == 1:
            return (y * F.silu(z)).flatten(2)
        gate = F.silu(z * wide(self.mimo_z).transpose(0, 1)) * wide(self.mimo_o).transpose(0, 1)
        return (y * gate).sum(2).flatten(2)

    def init_state(self, batch_size: int, max_len: int | None = None) -> Mamba3State:
        like = self.in_proj.weight
        options: dict[str, Any] = {"device": like.device, "dtype": state_dtype(like.dtype)}
        H, N, P = self.num_heads, self.state_dim, self.head_dim
        return Mamba3State(
            angle=torch.zeros(batch_size, H, self.num_angles, **options),
            ssm=torch.zeros(batch_size, H, N, P, **options),
            B=torch.zeros(batch_size, self.rank, H, N, **options),
            x=torch.zeros(batch_size, H, P, **options),
        )

    def state_bytes(self, batch_size: int, max_len: int) -> int:
        N, P = self.state_dim, self.head_dim
        head = self.num_angles + N * P + self.rank * N + P
        return batch_size * self.num_heads * head * state_dtype(self.in_proj.weight.dtype).itemsize

    def forward_flops(self, batch_size: int, seq_len: int, context_len: int = 0, streaming: bool = False) -> int:
        H, R, N, P = self.num_heads, self.rank, self.state_dim, self.head_dim
        total = linear_flops(batch_size * seq_len, self.in_proj, self.out_proj) + linear_attention_flops(
            batch_size, seq_len * R, H, N, P, chunk_size=self.chunk_size
        )
        if R > 1:  # pairs within a token, and the last token's part in the next step; elementwise at R = 1
            total += 2 * batch_size * H * R * (seq_len * R * (N + P) + streaming * N * P)
        return total

    def useful_flops(self, batch_size: int, seq_len: int, context_len: int = 0) -> int:
        tokens, H, R, N, P = batch_size * seq_len, self.num_heads, self.rank, self.state_dim, self.head_dim
        state = work.recurrence(work.LINEAR, tokens * R, H, N, P)
        within = 2 * tokens * H * R * R * (N + P) if R > 1 else 0  # pairs within a token
        return linear_flops(tokens, self.in_proj, self.out_proj) + state + within

    def vector_flops(self, batch_size: int, seq_len: int, context_len: int = 0) -> int:
        H, R, N = self.num_heads, self.rank, self.state_dim
        norms = 2 * R * N * (work.RMS * self.num_groups + H)  # and biases, of B and C
        turned = 2 * work.ROPE * R * H * 2 * self.num_angles + 3 * H * self.num_angles  # and the turns, added up
        # decay of the state; of each rank x spread and weighted, D x, norm and gate; the step, its decay and share
        inner = N + R * ((R > 1) + 1 + 2 + (0 if self.norm is None else work.RMS) + work.SILU + 1)
        return batch_size * seq_len * (norms + turned + self.inner * inner + 6 * H)

    def activation_elements(self, batch_size: int, seq_len: int) -> int:
        H, R, N, G, S = self.num_heads, self.rank, self.state_dim, self.num_groups, self.num_angles
        # x, in_proj; B and C normed, for each head, rotated; dt, delta, A, decays, gamma, what the next token adds
        row = self.dim + sum(self.rows) + 2 * R * G * (N + 1) + 2 * R * N * H * (1 + (S > 0))
        row += H * (5 + self.trapezoidal + R) + S * (2 + 3 * H) * (S > 0)  # turns; angles, their cos and sin
        # v as the op reads it, y, silu(z), what out_proj takes; with ranks those of each, and pairs of them
        if R == 1:
            row += 4 * self.inner + 3 * H
        else:
            row += (6 * R + 1) * self.inner + 3 * H * R * R + 2 * R * N * H
        if self.norm is not None:
            row += R * (2 * self.inner + H)
        return batch_size * (seq_len * row + -(-seq_len * R // INTERVAL) * self.inner * N)

    def parallel_plan(self) -> ParallelPlan:
        return ParallelPlan(
            context="pass_state",
            reason="in_proj stacks z, x, B, C and the gates, so its rows are not split as they lie",
        )


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, neighbours: bool) -> Tensor:
    """Turn S pairs of channels of x [..., N] by angles of cosines and sines [..., S]; the other channels pass.

    Pair i is (i, i + N / 2), or (2 i, 2 i + 1) with `neighbours`. Neighbours are left apart, all first ones before all
    second ones: B and C alike, so that no product of theirs changes, and nothing is interleaved.
    """
    S = cos.shape[-1]
    if neighbours:
        a, b = x[..., : 2 * S].unflatten(-1, (S, 2)).unbind(-1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos, x[..., 2 * S :]], -1)
    left, right = x.chunk(2, -1)
    a, b = left[..., :S], right[..., :S]
    return torch.cat([a * cos - b * sin, left[..., S:], a * sin + b * cos, right[..., S:]], -1)
