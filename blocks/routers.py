"""Routers of loops and routes: which tokens take which step.

Scores are computed in the stream's dtype; a choice never leaks gradient by itself, only its weight does.
"""

from __future__ import annotations

import itertools
from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.contract import Pick, Router, add_auxiliary_loss, init_linear_
from zoo.kernels.linear import Linear
from zoo.registry import register
from zoo.schema import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt, Range


@register("fixed", kind="router")
class FixedRouter(Router):
    """Every token takes every step of a loop, or the body `body` of a route; no parameters."""

    def __init__(
        self,
        dim: int,
        *,
        body: Annotated[int, Range(ge=0)] = 0,
        steps: PositiveInt = 1,
        nested: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__(dim, steps, nested)
        if body >= steps:
            raise ValueError(f"body: {body} does not exist; there are {steps} bodies")
        self.body = body

    def pick(self, step, x, carry, streaming):
        if self.nested or step == self.body:
            return Pick()
        return Pick(mask=x.new_zeros(x.shape[:2], dtype=torch.bool))

    def share(self, step):
        return float(self.nested or step == self.body)


@register("act", kind="router", paper="arXiv:1603.08983")
class AdaptiveComputationTime(Router):
    """Adaptive computation time per token (Graves 2016; Universal Transformer, arXiv:1807.03819).

    p_n = sigmoid(w x_n + b) before step n; a token halts at the first n with sum p >= 1 - eps; the output is
    sum_n u_n x_{n+1} with u_n = p_n, the remainder at the halting step. Loss: ponder_coef * mean(n + remainder).
    All steps are computed for every token, because later tokens may read its keys at every step.
    """

    def __init__(
        self,
        dim: int,
        *,
        eps: Annotated[float, Range(gt=0, lt=1)] = 0.01,
        ponder_coef: NonNegativeFloat = 0.01,
        bias_start: float = 1.0,
        assign_remainder: bool = True,
        steps: PositiveInt = 1,
        nested: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__(dim, steps, nested)
        if not nested:
            raise ValueError("act halts the steps of a loop; it cannot choose the body of a route")
        self.eps, self.ponder_coef, self.bias_start = eps, ponder_coef, bias_start
        self.assign_remainder = assign_remainder
        self.halt = Linear(dim, 1, device=device, dtype=dtype)
        self.metrics: dict[str, Tensor] = {}

    def reset_parameters(self):
        init_linear_(self.halt)
        nn.init.constant_(self.halt.bias, self.bias_start)

    def start(self, x):
        zero = x.new_zeros(x.shape[:2])
        return {"halted": zero, "ponder": zero, "output": torch.zeros_like(x)}

    def pick(self, step, x, carry, streaming):
        p = torch.sigmoid(self.halt(x)).squeeze(-1)
        before = carry["halted"]
        running = before < 1
        stops = running & (before + p >= 1 - self.eps)
        if self.assign_remainder and step == self.steps - 1:
            stops = running
        remainder = 1 - before
        carry["weight"] = torch.where(stops, remainder, torch.where(running, p, 0.0))
        carry["halted"] = torch.where(stops, torch.ones_like(before), before + torch.where(running, p, 0.0))
        carry["ponder"] = carry["ponder"] + running + torch.where(stops, remainder, 0.0)
        return Pick()

    def advance(self, step, x, increment, carry):
        x = x + increment
        carry["output"] = carry["output"] + carry["weight"].unsqueeze(-1) * x
        return x

    def finish(self, x, carry):
        output = carry["output"]
        if self.training:
            self.metrics = {"ponder": carry["ponder"].detach().mean()}
            output = add_auxiliary_loss(output, self.ponder_coef * carry["ponder"].mean())
        return output

    def step_flops(self, tokens):
        return self.steps * super().step_flops(tokens)  # asked before every step


@register("exit", kind="router", paper="arXiv:2502.05171")
class EarlyExit(Router):
    """Early exit: at inference a token leaves the loop after the step that hardly changed it.

    latent: |s_n - s_{n-1}| < threshold * |s_n|; kl: KL(p_n || p_{n-1}) < threshold, p_n the distribution that the
    model's final norm and head read off s_n. (Huginn reads it through the coda too, whose cache would have to be
    taken back at every step.) Usual thresholds: 0.03 and 1e-3. Training takes all steps. No parameters.
    """

    def __init__(
        self,
        dim: int,
        *,
        metric: Literal["latent", "kl"] = "latent",
        threshold: PositiveFloat = 0.03,
        steps: PositiveInt = 1,
        nested: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__(dim, steps, nested)
        if not nested:
            raise ValueError("exit ends the steps of a loop; it cannot choose the body of a route")
        self.metric, self.threshold = metric, threshold
        self.readout: tuple[nn.Module, ...] = ()  # final norm and head, given by the model

    def pick(self, step, x, carry, streaming):
        if self.training and not streaming:
            return Pick()
        if step == 0:
            carry["active"] = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        return Pick() if step < 2 else Pick(mask=carry["active"])  # two steps make the first change

    def advance(self, step, x, increment, carry):
        new = x + increment
        if "active" not in carry:
            return new
        if step:
            new = torch.where(carry["active"].unsqueeze(-1), new, carry["last"])
            carry["active"] = carry["active"] & (self._change(new, carry["last"]) >= self.threshold)
        carry["last"] = new
        return new

    def _change(self, new, last):
        if self.metric == "latent":
            return (new - last).norm(dim=-1) / new.norm(dim=-1)
        p, q = (self._log_distribution(s) for s in (new, last))
        return (p.exp() * (p - q)).sum(-1)

    def _log_distribution(self, x):
        for module in self.readout:
            x = module(x)
        return x.log_softmax(-1)


@register(
    "expert_choice",
    kind="router",
    paper="arXiv:2507.10524",
    note="training picks the top k of a row, which looks ahead; eval() and streaming compare with a threshold",
)
class ExpertChoiceRouter(Router):
    """Expert choice of Mixture-of-Recursions: each step takes the `capacity` share of tokens it scores highest.

    z = w_r x, s = scale * act(z). Training: the top floor(capacity_r * T) of the tokens still running, in
    order; eval and streaming: sigmoid(z) > 0.5. x += s * (step(x) - x) at chosen tokens. A binary
    cross-entropy of z against the choice (aux_coef) makes the threshold agree with the top k.
    """

    def __init__(
        self,
        dim: int,
        *,
        capacity: Fraction | list[Fraction] | None = None,
        activation: Literal["sigmoid", "raw", "one"] = "sigmoid",
        scale: PositiveFloat = 1.0,
        aux_coef: NonNegativeFloat = 1e-3,
        inference: Literal["threshold", "top_k"] = "threshold",
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
        self.capacity, self.activation, self.scale, self.aux_coef = capacities, activation, scale, aux_coef
        self.causal = inference == "threshold"
        self.score = Linear(dim, steps, bias=False, device=device, dtype=dtype)
        self.metrics: dict[str, Tensor] = {}

    def reset_parameters(self):
        init_linear_(self.score)

    def start(self, x):
        return {"active": torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)}

    def pick(self, step, x, carry, streaming):
        active = carry["active"]
        z = F.linear(x, self.score.weight[step : step + 1]).squeeze(-1)
        pick, chosen = self._choose(step, z, active, streaming)
        carry["active"], carry["weight"], carry["loss"] = chosen, self._weight(z), None
        if self.training and self.aux_coef:
            bce = F.binary_cross_entropy_with_logits(z.float(), chosen.float(), reduction="none")
            carry["loss"] = self.aux_coef * (bce * active).sum() / active.sum()
            self.metrics = {f"share_{step}": chosen.detach().float().mean()}
        return pick

    def _choose(self, step, z, active, streaming):
        if self.capacity[step] >= 1:
            # everything that is still running: known without scores, so no gather in the first step
            return (Pick() if step == 0 else Pick(mask=active)), active
        if (self.training and not streaming) or not self.causal:
            k = max(1, int(self.capacity[step] * z.shape[1]))
            index = z.masked_fill(~active, -torch.inf).topk(k, dim=1).indices.sort(dim=1).values
            return Pick(index=index), torch.zeros_like(active).scatter(1, index, True)
        chosen = active & (z > 0)
        return Pick(mask=chosen), chosen

    def _weight(self, z):
        if self.activation == "one":
            return torch.ones_like(z)
        return self.scale * (torch.sigmoid(z) if self.activation == "sigmoid" else z)

    def advance(self, step, x, increment, carry):
        x = x + carry["weight"].unsqueeze(-1) * increment
        return x if carry["loss"] is None else add_auxiliary_loss(x, carry["loss"])

    def share(self, step):
        return self.capacity[step]


@register(
    "mod",
    kind="router",
    paper="arXiv:2404.02258",
    note="training picks the top k of a row, which looks ahead; eval() and streaming compare with a threshold",
)
class MixtureOfDepthsRouter(ExpertChoiceRouter):
    """Mixture-of-Depths: x += r * f(x) for the top `capacity` of tokens, r = w x; the others skip the body.

    Expert choice with one step whose weight is the raw score (Raposo et al. 2024). Decoding takes tokens with
    sigmoid(r) > 0.5, which the binary cross-entropy (aux_coef) trains.
    """

    def __init__(
        self,
        dim: int,
        *,
        capacity: Fraction = 0.125,
        activation: Literal["sigmoid", "raw", "one"] = "raw",
        aux_coef: NonNegativeFloat = 0.01,
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
            steps=steps,
            nested=nested,
            device=device,
            dtype=dtype,
        )


@register("token_choice", kind="router", paper="arXiv:2507.10524")
class TokenChoiceRouter(Router):
    """Each token chooses once, at the entry: how many steps of a loop it takes, or which body of a route.

    p = softmax(W x) over the steps or bodies, i = argmax p; output x + p_i * (f(x) - x), where f is i + 1
    steps or body i. Losses: balance_coef * R sum_i mean(p_i) * share_i, z_coef * mean(logsumexp^2).
    """

    def __init__(
        self,
        dim: int,
        *,
        balance_coef: NonNegativeFloat = 0.1,
        z_coef: NonNegativeFloat = 1e-5,
        steps: PositiveInt = 1,
        nested: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__(dim, steps, nested)
        self.balance_coef, self.z_coef = balance_coef, z_coef
        self.score = Linear(dim, steps, bias=False, device=device, dtype=dtype)
        self.metrics: dict[str, Tensor] = {}

    def reset_parameters(self):
        init_linear_(self.score)

    def start(self, x):
        logits = self.score(x)
        p = logits.softmax(-1)
        best, choice = p.max(-1)
        carry = {"input": x, "choice": choice, "weight": best}
        if self.training:
            shares = F.one_hot(choice, self.steps).to(p.dtype).mean((0, 1))
            balance = self.steps * (p.mean((0, 1)) * shares).sum()
            carry["loss"] = self.balance_coef * balance + self.z_coef * logits.logsumexp(-1).square().mean()
            self.metrics = {f"share_{i}": s.detach() for i, s in enumerate(shares)}
        return carry

    def pick(self, step, x, carry, streaming):
        if self.nested and step == 0:
            return Pick()
        return Pick(mask=carry["choice"] >= step if self.nested else carry["choice"] == step)

    def finish(self, x, carry):
        y = carry["input"] + carry["weight"].unsqueeze(-1) * (x - carry["input"])
        return add_auxiliary_loss(y, carry["loss"]) if "loss" in carry else y

    def share(self, step):
        return (self.steps - step) / self.steps if self.nested else 1 / self.steps
