"""Routers that choose tokens for a body (expert choice), or a body for every token (token choice).

Scores are computed in the stream's dtype; a choice never leaks gradient by itself, only its weight does.
"""

from __future__ import annotations

import itertools
import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.blocks.measure import balance_loss, group_counts, recording
from zoo.contract import Pick, Router, add_auxiliary_loss, counted_by_all, init_linear_, mean_over_all, state_dtype
from zoo.kernels.linear import Linear
from zoo.registry import register
from zoo.schema import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt


class ChoicePredictor(nn.Module):
    """Says from the stream alone whether a token will be among the top k: W_2 gelu(W_1 x + b_1) + b_2, a logit a step.

    The stream is detached: its loss trains nothing but the predictor.
    """

    def __init__(self, dim: int, steps: int, device, dtype):
        super().__init__()
        width = max(dim // 4, 1)
        self.up_proj = Linear(dim, width, device=device, dtype=dtype)
        self.down_proj = Linear(width, steps, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        init_linear_(self.up_proj)
        init_linear_(self.down_proj)

    def forward(self, x: Tensor, step: int) -> Tensor:
        row = slice(step, step + 1)
        h = F.gelu(self.up_proj(x.detach()))
        return F.linear(h, self.down_proj.weight[row], self.down_proj.bias[row]).squeeze(-1)


@register(
    "expert_choice",
    kind="router",
    paper="arXiv:2507.10524",
    relations=(
        "loop(steps=3, router={'expert_choice': {'capacity': 1.0, 'activation': 'one'}}) == loop(steps=3)",
        "loop(steps=3, kv='first', router={'expert_choice': {'capacity': 1.0, 'activation': 'one'}}) "
        "== loop(steps=3, kv='first')",
    ),
    note="training picks the top k of a row, which looks ahead; eval() and streaming decide token by token",
)
class ExpertChoiceRouter(Router):
    """Expert choice of Mixture-of-Recursions: each step takes the `capacity` share of tokens it scores highest.

    z = w_r x, s = scale * act(z). Training: the top floor(capacity_r * T) of the tokens still running, in order;
    x += s * (step(x) - x) at chosen tokens. In eval() and streaming a token is chosen by itself, where a logit g is
    positive: g = z (`inference: threshold`) or that of a small network on the detached stream (`predictor`).
    Losses: aux_coef * the binary cross-entropy of g against the top k, which makes them agree; z_coef * mean(z^2).
    `warmup_steps`: so many optimiser steps in which training's capacity falls from 1 by a cosine.
    With capacity 1 and activation one: a plain loop.
    Useful: 2 D FLOPs a token and step, and a predictor's; a step is counted on its capacity of the tokens.
    """

    steps_done: Tensor | None

    def __init__(
        self,
        dim: int,
        *,
        capacity: Fraction | list[Fraction] | None = None,
        activation: Literal["sigmoid", "tanh", "raw", "one"] = "sigmoid",
        scale: PositiveFloat = 1.0,
        aux_coef: NonNegativeFloat = 1e-3,
        z_coef: NonNegativeFloat = 0.0,
        warmup_steps: NonNegativeInt = 0,
        inference: Literal["threshold", "predictor", "top_k"] = "threshold",
        steps: PositiveInt = 1,
        nested: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__(dim, steps, nested)
        if capacity is None:
            capacity = [(steps - r) / steps for r in range(steps)] if nested else 1 / steps
        capacities = list(capacity) if isinstance(capacity, (list, tuple)) else [capacity] * steps
        if len(capacities) != steps:
            raise ValueError(f"capacity has {len(capacities)} numbers for {steps} steps")
        if nested and any(a < b for a, b in itertools.pairwise(capacities)):
            raise ValueError(f"capacity must not grow from step to step, got {capacities}")
        if not nested and steps > 1:
            raise ValueError("expert_choice routes to one body (others are skipped); use token_choice for several")
        if inference == "predictor" and not aux_coef:
            raise ValueError("aux_coef=0 never trains the predictor; give aux_coef > 0, or inference: threshold")
        self.capacity, self.activation, self.scale = capacities, activation, scale
        self.aux_coef, self.z_coef, self.warmup_steps = aux_coef, z_coef, warmup_steps
        self.causal = inference != "top_k"
        self.score = Linear(dim, steps, bias=False, device=device, dtype=dtype)
        self.predictor = ChoicePredictor(dim, steps, device, dtype) if inference == "predictor" else None
        count = torch.empty((), dtype=torch.int64, device=device)
        self.register_buffer("steps_done", count if warmup_steps else None)
        self.metrics: dict[str, Tensor] = {}

    def reset_parameters(self):
        init_linear_(self.score)
        if self.predictor is not None:
            self.predictor.reset_parameters()
        if self.steps_done is not None:
            self.steps_done.zero_()

    def after_step(self) -> None:
        """Counts the optimiser steps of the warm-up."""
        if self.steps_done is not None:
            self.steps_done += 1

    def capacity_now(self, step: int) -> float:
        """The share of tokens that a step takes at this point of training; afterwards that of the options."""
        final = self.capacity[step]
        if self.steps_done is None or not self.training:
            return final
        progress = min(int(self.steps_done) / self.warmup_steps, 1.0)
        return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2

    def start(self, x):
        if recording(self):
            self.metrics = {}
        return {"active": torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)}

    def pick(self, step, x, carry, streaming):
        active = carry["active"]
        z = F.linear(x, self.score.weight[step : step + 1]).squeeze(-1)
        guess = z if self.predictor is None else self.predictor(x, step)
        pick, chosen = self._choose(step, z, guess, active, streaming)
        carry["active"], carry["weight"] = chosen, self._weight(z)
        if self.training:
            self._learn(step, z, guess, active, chosen, carry)
        return pick

    def _choose(self, step, z, guess, active, streaming):
        capacity = self.capacity_now(step)
        if capacity >= 1:
            # everything that is still running: known without scores, so no gather in the first step
            return (Pick() if step == 0 else Pick(mask=active)), active
        if (self.training and not streaming) or not self.causal:
            k = max(1, int(capacity * z.shape[1]))
            index = z.masked_fill(~active, -torch.inf).topk(k, dim=1).indices.sort(dim=1).values
            return Pick(index=index), torch.zeros_like(active).scatter(1, index, True)
        chosen = active & (guess > 0)
        return Pick(mask=chosen), chosen

    def _weight(self, z):
        if self.activation == "one":
            return torch.ones_like(z)
        act = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "raw": lambda s: s}[self.activation]
        return self.scale * act(z)

    def _learn(self, step, z, guess, active, chosen, carry):
        def mean(value):
            return (value * active).sum() / active.sum().clamp(min=1)

        losses = []
        if self.aux_coef:
            bce = F.binary_cross_entropy_with_logits(guess.float(), chosen.float(), reduction="none")
            losses.append(self.aux_coef * mean(bce))
        if self.z_coef:
            losses.append(self.z_coef * mean(z.float().square()))
        if losses:
            carry["loss"] = torch.stack(losses).sum()
        if recording(self):
            self.metrics[f"share_{step}"] = chosen.detach().float().mean()
            self.metrics[f"agreement_{step}"] = mean(((guess > 0) == chosen).float())

    def advance(self, step, x, increment, carry):
        x = x + carry["weight"].unsqueeze(-1) * increment
        return add_auxiliary_loss(x, carry["loss"]) if "loss" in carry else x

    def share(self, step):
        return self.capacity[step]

    def activation_elements(self, tokens, entered=False):
        # increments that are weighted; score, weight, guess and choice of each step
        weighted = self.dim if self.activation != "one" else 0
        return self.steps * tokens * (weighted + 4)

    def step_flops(self, tokens):
        flops = 2 * tokens * self.score.weight.numel()
        if self.predictor is not None:  # its first layer runs before every step
            flops += 2 * tokens * (self.steps * self.predictor.up_proj.weight.numel())
            flops += 2 * tokens * self.predictor.down_proj.weight.numel()
        return flops


@register(
    "mod",
    kind="router",
    paper="arXiv:2404.02258",
    relations=("route(router={'mod': {'capacity': 1.0, 'activation': 'one'}}) == sequence()",),
    note="training picks the top k of a row, which looks ahead; eval() and streaming decide token by token",
)
class MixtureOfDepthsRouter(ExpertChoiceRouter):
    """Mixture-of-Depths: x += r * f(x) for the top `capacity` of tokens, r = w x; the others skip the body.

    Expert choice with one step whose weight is the raw score (Raposo et al. 2024). Decoding takes tokens with
    sigmoid(g) > 0.5; aux_coef * a binary cross-entropy against the top k trains g: the score r itself (`threshold`;
    then it is also a loss of the stream) or a small network on the detached stream (`predictor`).
    Useful: 2 D FLOPs a token; the body is counted on its capacity of the tokens.
    """

    def __init__(
        self,
        dim: int,
        *,
        capacity: Fraction = 0.125,
        activation: Literal["sigmoid", "raw", "one"] = "raw",
        aux_coef: NonNegativeFloat = 0.01,
        inference: Literal["threshold", "predictor"] = "threshold",
        steps: PositiveInt = 1,
        nested: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__(
            dim,
            capacity=capacity,
            activation=activation,
            aux_coef=aux_coef,
            inference=inference,
            steps=steps,
            nested=nested,
            device=device,
            dtype=dtype,
        )


@register(
    "token_choice",
    kind="router",
    paper="arXiv:2507.10524",
    relations=("route(router='token_choice') == sequence()",),
)
class TokenChoiceRouter(Router):
    """Each token chooses once, at the entry: how many steps of a loop it takes, or which body of a route.

    p = softmax(W x) over the steps or bodies, i = argmax (p + b); output x + p_i * (f(x) - x), where f is i + 1 steps
    or body i. Balance in training: `aux` adds balance_coef * R sum_i mean(p_i) * share_i and keeps b = 0; `bias`
    moves b by bias_update_rate * sign(mean load - load) at each `update_bias()`. And z_coef * mean(logsumexp^2).
    Useful: 2 D FLOPs a token for each step or body; step r of R is counted on (R - r) / R of the tokens, a body on
    1 / R.
    """

    segmented = True
    selection_bias: Tensor | None
    counts: Tensor | None

    def __init__(
        self,
        dim: int,
        *,
        balance: Literal["aux", "bias"] = "aux",
        balance_coef: NonNegativeFloat = 0.1,
        bias_update_rate: NonNegativeFloat = 1e-3,
        z_coef: NonNegativeFloat = 1e-5,
        steps: PositiveInt = 1,
        nested: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__(dim, steps, nested)
        self.balance, self.balance_coef, self.z_coef = balance, balance_coef, z_coef
        self.bias_update_rate = bias_update_rate
        self.score = Linear(dim, steps, bias=False, device=device, dtype=dtype)
        biased = balance == "bias"
        self.register_buffer("selection_bias", torch.empty(steps, device=device) if biased else None)
        counts = torch.empty(steps, dtype=torch.int64, device=device)
        self.register_buffer("counts", counts if biased else None, persistent=False)
        self.metrics: dict[str, Tensor] = {}

    def reset_parameters(self):
        init_linear_(self.score)
        for buffer in (self.selection_bias, self.counts):
            if buffer is not None:
                buffer.zero_()

    def start(self, x):
        logits = self.score(x)
        p = logits.softmax(-1)
        choice = (p if self.selection_bias is None else p + self.selection_bias).argmax(-1)
        carry = {"input": x, "choice": choice, "weight": p.gather(-1, choice.unsqueeze(-1)).squeeze(-1)}
        if self.training:
            self._learn(logits, p, choice, carry)
        return carry

    def _learn(self, logits, p, choice, carry):
        counts = counted_by_all(group_counts(choice, self.steps))
        carry["loss"] = self.z_coef * logits.logsumexp(-1).square().mean()
        if self.balance == "aux":
            carry["loss"] = carry["loss"] + self.balance_coef * balance_loss(p.flatten(0, 1), counts)
        if recording(self):
            self.metrics = {f"share_{i}": n / counts.sum() for i, n in enumerate(counts.unbind())}
            if self.counts is not None:
                self.counts.add_(counts)

    @torch.no_grad()
    def update_bias(self) -> None:
        """Move the selection bias against the loads counted since the last call; once per optimiser step."""
        if self.selection_bias is None or self.counts is None:
            return
        load = self.counts.to(self.selection_bias.dtype)
        self.selection_bias.add_(torch.sign(load.mean() - load), alpha=self.bias_update_rate)
        self.counts.zero_()

    def pick(self, step, x, carry, streaming):
        if self.nested and step == 0:
            return Pick()
        return Pick(mask=carry["choice"] >= step if self.nested else carry["choice"] == step)

    def finish(self, x, carry):
        y = carry["input"] + carry["weight"].unsqueeze(-1) * (x - carry["input"])
        return add_auxiliary_loss(y, carry["loss"]) if "loss" in carry else y

    def share(self, step):
        return (self.steps - step) / self.steps if self.nested else 1 / self.steps

    def activation_elements(self, tokens, entered=False):
        # what the chosen step or body has added; logits and their softmax, the choice and its weight, a logsumexp
        return tokens * (self.dim + 2 * self.steps + 5)


@register("skip_layer", kind="router", paper="arXiv:2311.15436")
class SkipLayerRouter(Router):
    """SkipLayer: a gate per token decides whether it takes the body, which reads the keys of skipped tokens too.

    z = W_g x in R^2, m = [z_1 > z_0], x += m * f(x). Training runs f on every token and draws m by a straight-through
    Gumbel softmax at `temperature`: forward hard, backward soft. Loss: density_coef * (mean(m) - density)^2.
    Unlike in Mixture-of-Depths a skipped token leaves its keys and values; only queries, attention and what follows
    are saved, and the choice is causal by itself. The body is an attention block, then blocks without state, or those
    alone. Reconstructed: no code was published, and the form of the loss is ours.
    Useful: 4 D FLOPs a token; in training the body counts on all tokens, else its queries on `density` of them.
    """

    reads_all = True

    def __init__(
        self,
        dim: int,
        *,
        density: Fraction = 0.5,
        density_coef: NonNegativeFloat = 0.1,
        temperature: PositiveFloat = 1.0,
        steps: PositiveInt = 1,
        nested: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__(dim, steps, nested)
        if nested or steps > 1:
            raise ValueError("skip_layer chooses whether a token takes the one body of a route")
        self.density, self.density_coef, self.temperature = density, density_coef, temperature
        self.score = Linear(dim, 2, bias=False, device=device, dtype=dtype)
        self.metrics: dict[str, Tensor] = {}

    def reset_parameters(self):
        init_linear_(self.score)

    def pick(self, step, x, carry, streaming):
        z = self.score(x)
        if streaming or not self.training:
            return Pick(mask=z[..., 1] > z[..., 0])
        m = carry["weight"] = F.gumbel_softmax(z, self.temperature, hard=True)[..., 1]
        chosen = m.to(state_dtype(m.dtype))  # sums in half precision would be none
        share = mean_over_all(chosen.sum(), chosen.new_tensor(chosen.numel()))
        carry["loss"] = self.density_coef * (share - self.density).square()
        if recording(self):
            self.metrics = {"share_0": share.detach()}
        return Pick()

    def advance(self, step, x, increment, carry):
        if "weight" not in carry:
            return x + increment
        return add_auxiliary_loss(x + carry["weight"].unsqueeze(-1) * increment, carry["loss"])

    def share(self, step):
        return self.density

    def activation_elements(self, tokens, entered=False):
        return tokens * (self.dim + 4)  # the increment that is weighted, the softmax of two scores, the weight
