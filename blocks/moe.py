"""Token-choice mixture of experts (Mixtral; DeepSeek-V3, arXiv:2412.19437; loss-free balance, arXiv:2408.15664).

s = softmax(z) or sigmoid(z) in fp32, z = W_g x or, on X-MoE's hypersphere (arXiv:2204.09179), the cosines of a
projection of x with one vector per expert; selected: the k best of s + b, if wanted among the best groups of
experts only; w = s[selected], renormalised, times route_scale; y = sum_i w_i FFN_i(x) + FFN_shared(x).
b (only with balance: bias) steers the selection alone and learns from the loads, not from a gradient.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.blocks.experts import MLPExperts, SwiGLUExperts
from zoo.blocks.measure import balance_loss, group_counts, load_metrics, recording
from zoo.blocks.mlp import MLP
from zoo.blocks.swiglu import SwiGLU, swiglu_width
from zoo.contract import (
    Block,
    Cost,
    Mode,
    ParallelPlan,
    State,
    add_auxiliary_loss,
    counted_by_all,
    init_linear_,
    linear_flops,
)
from zoo.kernels import work
from zoo.kernels.dispatch import check_backend
from zoo.kernels.linear import Linear
from zoo.kernels.precision import no_autocast
from zoo.registry import register
from zoo.schema import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt


class TopKRouter(nn.Module):
    """Scores of experts and the choice among them; see the module's equations."""

    e_score_correction_bias: Tensor | None

    def __init__(
        self, dim, num_experts, *, top_k, score, renormalize, route_scale, num_groups, top_groups, selection_bias,
        device, dtype, bias=False,
    ):  # fmt: skip
        super().__init__()
        self.top_k, self.score, self.renormalize, self.route_scale = top_k, score, renormalize, route_scale
        self.num_groups, self.top_groups = num_groups, top_groups
        self.weight = nn.Parameter(torch.empty(num_experts, dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_experts, device=device, dtype=dtype)) if bias else None
        if selection_bias:
            # never below fp32: its steps are about 1e-3
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            self.register_buffer("e_score_correction_bias", torch.empty(num_experts, device=device, dtype=wide))
        else:
            self.e_score_correction_bias = None

    def reset_parameters(self) -> None:
        std = self.weight.shape[1] ** -0.5
        nn.init.trunc_normal_(self.weight, std=std, a=-3 * std, b=3 * std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        if self.e_score_correction_bias is not None:
            nn.init.zeros_(self.e_score_correction_bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x: [N, D] -> logits [N, E], scores [N, E], indices [N, k], weights [N, k]; floats fp32 or wider."""
        with no_autocast(x.device):
            logits = self._logits(x.to(torch.float64 if x.dtype == torch.float64 else torch.float32))
        scores = logits.softmax(-1) if self.score == "softmax" else logits.sigmoid()
        wanted = scores.detach()
        if self.e_score_correction_bias is not None:
            wanted = wanted + self.e_score_correction_bias
        if self.top_groups < self.num_groups:
            wanted = self._within_best_groups(wanted)
        indices = wanted.topk(self.top_k, dim=-1).indices
        weights = scores.gather(1, indices)
        if self.renormalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return logits, scores, indices, weights if self.route_scale == 1 else weights * self.route_scale

    def _logits(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def flops(self, tokens: int) -> int:
        return 2 * tokens * self.weight.numel()

    def vector_flops(self, tokens: int) -> int:
        """Scores of experts, and weights of the chosen ones."""
        score = work.SOFTMAX if self.score == "softmax" else work.SIGMOID
        chosen = self.top_k * (2 * self.renormalize + (self.route_scale != 1))
        biased = (self.e_score_correction_bias is not None) + (self.bias is not None)
        return tokens * ((score + biased) * self.weight.shape[0] + chosen)

    def activation_elements(self, tokens: int) -> int:
        """Elements kept for backward beside x: scores; of those chosen the index, the score and, as parts of their
        sum, the weight."""
        return tokens * (len(self.weight) + 3 * self.top_k + (self.top_k + 1) * self.renormalize)

    def _within_best_groups(self, wanted: Tensor) -> Tensor:
        groups = wanted.unflatten(-1, (self.num_groups, -1))
        # a group is as good as its best expert (DeepSeek-V2), with sigmoid scores its best two (V3)
        best = 1 if self.score == "softmax" else min(2, groups.shape[-1])
        kept = groups.topk(best, dim=-1).values.sum(-1).topk(self.top_groups, dim=-1).indices
        out = torch.ones_like(groups[..., 0], dtype=torch.bool).scatter(1, kept, False)
        return groups.masked_fill(out[..., None], float("-inf")).flatten(1)


class HypersphereRouter(TopKRouter):
    """X-MoE: z_i = cos(W x, e_i) / tau with W [d, D], e_i [d] and a learned tau = exp(log_temperature).

    Both sides are normalised and tau is learned, as in the paper (the released code does neither for the token).
    """

    def __init__(self, dim, num_experts, *, router_dim, device, dtype, **options):
        super().__init__(router_dim, num_experts, device=device, dtype=dtype, **options)  # weight: the e_i
        self.proj = Linear(dim, router_dim, bias=False, device=device, dtype=dtype)
        self.log_temperature = nn.Parameter(torch.empty(1, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        init_linear_(self.proj)
        nn.init.constant_(self.log_temperature, math.log(0.3))

    def _logits(self, x: Tensor) -> Tensor:
        token = F.normalize(F.linear(x, self.proj.weight.to(x.dtype)), dim=-1)
        expert = F.normalize(self.weight.to(x.dtype), dim=-1)
        return F.linear(token, expert) * torch.exp(-self.log_temperature.to(x.dtype))

    def flops(self, tokens: int) -> int:
        return super().flops(tokens) + linear_flops(tokens, self.proj)

    def vector_flops(self, tokens: int) -> int:
        experts, width = self.weight.shape  # the token made of length one, cosines over the temperature
        return super().vector_flops(tokens) + tokens * (work.UNIT * width + experts)

    def activation_elements(self, tokens: int) -> int:
        # the mapped token and its unit vector, its length twice, cosines
        return super().activation_elements(tokens) + tokens * (2 * self.proj.out_features + 2 + len(self.weight))


@register(
    "moe",
    kind="ffn",
    paper="arXiv:2412.19437",
    ops=("grouped_mm",),
    relations=(
        "moe(num_groups=4, top_groups=4) == moe()",
        "moe(balance='bias') == moe(balance='none')",
        "moe(num_shared_experts=2, hidden_dim=16) == moe(shared_dim=32, hidden_dim=16)",
        "moe(num_experts=1, top_k=1, hidden_dim=32, activation='relu2') == mlp(hidden_dim=32, activation='relu2') at "
        "experts.up_proj[0]=up_proj.weight, experts.down_proj[0]=down_proj.weight",
        "moe(bias=True) == moe() at gate.bias=0, gate_up_proj_bias=0, down_proj_bias=0",
        "moe(top_k=8, renormalize=True) == moe(top_k=8, renormalize=False)",
        "moe(num_experts=1, top_k=1, hidden_dim=32) == swiglu(hidden_dim=32) at "
        "experts.gate_up_proj[0, :32]=gate_proj.weight, experts.gate_up_proj[0, 32:]=up_proj.weight, "
        "experts.down_proj[0]=down_proj.weight",
    ),
    examples=(
        {"hidden_dim": 32},
        {"hidden_dim": 32, "score": "sigmoid", "balance": "bias", "num_shared_experts": 1, "route_scale": 2.5},
        {"hidden_dim": 32, "score": "sigmoid", "num_groups": 4, "top_groups": 2, "z_loss_coef": 0.001},
        {"hidden_dim": 16, "num_shared_experts": 1, "shared_gate": True},
        {"hidden_dim": 24, "num_experts": 4, "top_k": 1, "renormalize": False, "balance": "none"},
        {"hidden_dim": 32, "router": "hypersphere", "sequence_aux_coef": 0.01},
        {"hidden_dim": 24, "num_experts": 4, "bias": True, "swiglu_limit": 1.0},
        {"hidden_dim": 24, "num_experts": 4, "activation": "relu2", "shared_dim": 40},
    ),
)
class MixtureOfExperts(Block):
    """Token-choice mixture of SwiGLU experts: y = sum_{i in top-k} w_i FFN_i(x) + FFN_shared(x).

    s = softmax | sigmoid of W_g x (router: linear) or of cos(W x, e) / tau with vectors of router_dim channels
    (hypersphere); the top_k best of s (+ b) are chosen, with num_groups > 1 only inside the top_groups best
    groups; w = s[chosen] (renormalised to sum 1) * route_scale. Dropless, so neither batch nor segment changes a
    token's route. Balance in training: `aux` adds aux_coef * E sum f_i P_i over the tokens of the call, `bias`
    moves the selection bias b by bias_update_rate * sign(mean load - load) at each `update_bias()`, `none`
    nothing; sequence_aux_coef * the aux loss of each row alone and z_loss_coef * mean(logsumexp(logits)^2) come
    on top. DeepSeek-V3: score sigmoid, balance bias, sequence_aux_coef 1e-4, bias_update_rate 1e-3 (0 at the end).

    x: [B, T, D] -> y: [B, T, D]; no state. hidden_dim is the width of one expert (default: top_k experts are as
    wide as one SwiGLU), shared experts are one SwiGLU of num_shared_experts * hidden_dim or of `shared_dim`, with
    `shared_gate` times sigmoid(w x) (Qwen2-MoE, Qwen3-Next). GPT-OSS: `bias` gives biases to the router and the routed
    experts, and `swiglu_limit` L makes these (u + 1) g sigmoid(1.702 g) with g <= L and |u| <= L in place of silu(g) u.
    An `activation` f other than swiglu makes every expert an MLP W_down f(W_up x) (Nemotron 3). Active parameters and
    FLOPs a token: (top_k + num_shared_experts) 3 D hidden_dim + D E, twice that; 2 for 3 without a gate (hypersphere:
    (D + E) router_dim for D E, router_dim E / 2 by default). With one expert: SwiGLU.
    Useful: 6 D hidden_dim FLOPs a token for each chosen expert, 2 D E for the choice; weights that are read are
    those of the experts that tokens choose if they do so evenly.
    """

    expert_counts: Tensor

    def __init__(
        self,
        dim: int,
        *,
        num_experts: PositiveInt = 8,
        top_k: PositiveInt = 2,
        hidden_dim: PositiveInt | None = None,
        num_shared_experts: NonNegativeInt = 0,
        shared_gate: bool = False,
        router: Literal["linear", "hypersphere"] = "linear",
        router_dim: PositiveInt | None = None,
        score: Literal["softmax", "sigmoid"] = "softmax",
        renormalize: bool = True,
        route_scale: PositiveFloat = 1.0,
        num_groups: PositiveInt = 1,
        top_groups: PositiveInt = 1,
        balance: Literal["aux", "bias", "none"] = "aux",
        aux_coef: NonNegativeFloat = 0.01,
        sequence_aux_coef: NonNegativeFloat = 0.0,
        z_loss_coef: NonNegativeFloat = 0.0,
        bias_update_rate: NonNegativeFloat = 1e-3,
        bias: bool = False,
        swiglu_limit: PositiveFloat | None = None,
        activation: Literal["swiglu", "gelu", "gelu_tanh", "relu", "relu2", "silu"] = "swiglu",
        shared_dim: PositiveInt | None = None,
        kernel: str = "auto",
        device=None,
        dtype=None,
    ):
        super().__init__(dim)
        if top_k > num_experts:
            raise ValueError(f"top_k={top_k} is more than num_experts={num_experts}; lower top_k")
        if top_k == 1 < num_experts and renormalize:
            raise ValueError("top_k=1 with renormalize=true makes every weight 1, so the router would learn nothing "
                             "from the loss; set renormalize: false")  # fmt: skip
        if num_experts % num_groups:
            raise ValueError(f"num_groups={num_groups} must divide num_experts={num_experts}")
        if top_groups > num_groups:
            raise ValueError(f"top_groups={top_groups} is more than num_groups={num_groups}; lower top_groups")
        if top_k > top_groups * (num_experts // num_groups):
            raise ValueError(
                f"top_k={top_k} experts do not fit into top_groups={top_groups} groups of "
                f"{num_experts // num_groups}; raise top_groups"
            )
        if router_dim is not None and router == "linear":
            raise ValueError(f"router_dim={router_dim} is the width of the hypersphere; set router: hypersphere")
        if bias and router == "hypersphere":
            raise ValueError("bias=true shifts the logits of a linear router; set router: linear, or bias: false")
        if num_shared_experts and shared_dim:
            raise ValueError(
                f"num_shared_experts={num_shared_experts} and shared_dim={shared_dim} are both the width of the shared "
                "network: give one"
            )
        if shared_gate and not num_shared_experts and not shared_dim:
            raise ValueError("shared_gate=true gates the shared experts: give num_shared_experts, or shared_gate=false")
        if activation != "swiglu" and (bias or swiglu_limit):
            raise ValueError(f"bias and swiglu_limit are options of swiglu experts, not of activation={activation!r}")
        check_backend("grouped_mm", kernel)
        factory = {"device": device, "dtype": dtype}
        self.num_experts, self.top_k, self.num_shared_experts = num_experts, top_k, num_shared_experts
        self.hidden_dim = hidden_dim or -(-swiglu_width(dim) // (16 * top_k)) * 16
        self.balance, self.aux_coef, self.z_loss_coef = balance, aux_coef, z_loss_coef
        self.sequence_aux_coef, self.bias_update_rate = sequence_aux_coef, bias_update_rate
        choice = {
            "top_k": top_k, "score": score, "renormalize": renormalize, "route_scale": route_scale,
            "num_groups": num_groups, "top_groups": top_groups, "selection_bias": balance == "bias",
        }  # fmt: skip
        if router == "hypersphere":
            width = router_dim or max(num_experts // 2, 2)
            self.gate = HypersphereRouter(dim, num_experts, router_dim=width, **choice, **factory)
        else:
            self.gate = TopKRouter(dim, num_experts, bias=bias, **choice, **factory)
        shared, sizes = shared_dim or num_shared_experts * self.hidden_dim, (num_experts, dim, self.hidden_dim, kernel)
        self.shared_experts: SwiGLU | MLP | None = None
        if activation == "swiglu":
            self.experts = SwiGLUExperts(*sizes, bias=bias, limit=swiglu_limit, **factory)
            if shared:
                self.shared_experts = SwiGLU(dim, hidden_dim=shared, **factory)
        else:
            self.experts = MLPExperts(*sizes, activation=activation, **factory)
            if shared:
                self.shared_experts = MLP(dim, hidden_dim=shared, activation=activation, **factory)
        self.shared_expert_gate = Linear(dim, 1, bias=False, **factory) if shared_gate else None
        if balance == "bias":
            counts = torch.empty(num_experts, dtype=torch.int64, device=device)
            self.register_buffer("expert_counts", counts, persistent=False)
        self.metrics: dict[str, Tensor] = {}

    def reset_parameters(self) -> None:
        self.gate.reset_parameters()
        self.experts.reset_parameters()
        if self.shared_experts is not None:
            self.shared_experts.reset_parameters()
        if self.shared_expert_gate is not None:
            init_linear_(self.shared_expert_gate)
        if self.balance == "bias":
            self.expert_counts.zero_()

    def forward(
        self, x: Tensor, *, state: State | None = None, positions: Tensor | None = None, doc_ids: Tensor | None = None
    ) -> Tensor:
        flat = x.reshape(-1, self.dim)
        logits, scores, indices, weights = self.gate(flat)
        y = self.experts(flat, indices, weights).view_as(x)
        if self.shared_experts is not None:
            shared = self.shared_experts(x)
            if self.shared_expert_gate is not None:
                shared = shared * self.shared_expert_gate(x).sigmoid()
            y = y + shared
        if self.training:
            y = self._balance(y, logits, scores, indices)
        return y

    def _balance(self, y: Tensor, logits: Tensor, scores: Tensor, indices: Tensor) -> Tensor:
        record = recording(self)
        counts = counted_by_all(group_counts(indices, self.num_experts))
        metrics = load_metrics(counts)
        shares = scores / scores.sum(-1, keepdim=True)
        if self.balance == "aux" and self.aux_coef:
            loss = balance_loss(shares, counts)
            y, metrics["balance_loss"] = add_auxiliary_loss(y, self.aux_coef * loss), loss.detach()
        if self.sequence_aux_coef:
            rows = y.shape[0]
            chosen = indices.view(rows, -1)
            per_row = chosen.new_zeros(rows, self.num_experts).scatter_add_(1, chosen, torch.ones_like(chosen))
            loss = balance_loss(shares.unflatten(0, (rows, -1)), per_row)
            y, metrics["sequence_loss"] = add_auxiliary_loss(y, self.sequence_aux_coef * loss), loss.detach()
        if self.z_loss_coef:
            loss = logits.logsumexp(-1).square().mean()
            y, metrics["z_loss"] = add_auxiliary_loss(y, self.z_loss_coef * loss), loss.detach()
        if record:
            self.metrics = metrics
            if self.balance == "bias":
                self.expert_counts.add_(counts)
        return y

    @torch.no_grad()
    def update_bias(self) -> None:
        """Move the selection bias against the loads counted since the last call, once per optimiser step."""
        bias = self.gate.e_score_correction_bias
        if bias is not None:
            load = self.expert_counts.to(bias.dtype)
            bias.add_(torch.sign(load.mean() - load), alpha=self.bias_update_rate)
            self.expert_counts.zero_()

    def forward_flops(self, batch_size: int, seq_len: int, context_len: int = 0, streaming: bool = False) -> int:
        tokens = batch_size * seq_len
        shared = self.shared_experts.forward_flops(batch_size, seq_len) if self.shared_experts is not None else 0
        if self.shared_expert_gate is not None:
            shared += linear_flops(tokens, self.shared_expert_gate)
        return self.gate.flops(tokens) + self.experts.flops(tokens * self.top_k) + shared

    def vector_flops(self, batch_size: int, seq_len: int, context_len: int = 0) -> int:
        tokens = batch_size * seq_len
        total = self.gate.vector_flops(tokens) + self.experts.vector_flops(tokens * self.top_k)
        if self.shared_experts is not None:
            total += self.shared_experts.vector_flops(batch_size, seq_len) + tokens * self.dim
        if self.shared_expert_gate is not None:
            total += tokens * (work.SIGMOID + self.dim)
        return total

    def activation_elements(self, batch_size: int, seq_len: int) -> int:
        tokens, loss = batch_size * seq_len, (self.aux_coef if self.balance == "aux" else 0) or self.sequence_aux_coef
        shared = 0
        if self.shared_experts is not None:  # they read the same x
            shared = self.shared_experts.activation_elements(batch_size, seq_len) - tokens * self.dim
        if self.shared_expert_gate is not None:
            shared += tokens * (self.dim + 1)
        # x, what the router keeps, the sum that shares are parts of
        routing = tokens * (self.dim + bool(loss)) + self.gate.activation_elements(tokens)
        if self.z_loss_coef:
            routing += tokens * (1 + self.num_experts)  # logits and their logsumexp
        return routing + self.experts.activation_elements(tokens * self.top_k) + shared

    def product_elements(self, batch_size: int, seq_len: int) -> int:
        tokens = batch_size * seq_len
        routed = tokens * (self.num_experts + self.top_k * (2 * self.hidden_dim + self.dim))
        return super().product_elements(batch_size, seq_len) + routed

    def active_params(self) -> int:
        idle = self.num_experts - self.top_k
        return super().active_params() - idle * self.experts.params_per_expert

    def cost(self, batch_size: int, seq_len: int, context_len: int = 0, mode: Mode = "train") -> Cost:
        """As every block's; few tokens read few experts."""
        cost = super().cost(batch_size, seq_len, context_len, mode)
        idle, passes = self.experts.idle(batch_size * seq_len, self.top_k), 3 if mode == "train" else 1
        saved = passes * round(idle * self.experts.params_per_expert) * self.itemsize
        return cost.replace(bytes_read=cost.bytes_read - saved, groups=self.num_experts - idle)

    @property
    def expectation(self) -> str:
        return "moe: tokens choose experts evenly"

    def parallel_plan(self) -> ParallelPlan:
        plan = {"gate": "replicate", "experts": "expert"}
        if self.shared_experts is not None:
            inner = self.shared_experts.parallel_plan().tensor
            plan |= {f"shared_experts.{name}": how for name, how in inner.items()}
        if self.shared_expert_gate is not None:
            plan["shared_expert_gate"] = "replicate"
        return ParallelPlan(plan, units=self.num_experts, context="token")
