"""Routers by which every token takes every step, or leaves a loop when it has changed enough."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from zoo.contract import Pick, Router, add_auxiliary_loss, init_linear_
from zoo.kernels.linear import Linear
from zoo.registry import register
from zoo.schema import NonNegativeFloat, PositiveFloat, PositiveInt, Range


@register("fixed", kind="router", relations=("loop(steps=3, router='fixed') == loop(steps=3)",))
class FixedRouter(Router):
    """Every token takes every step of a loop, or the body `body` of a route; no parameters.

    Useful: no work of its own.
    """

    takes_all = True
    segmented = True

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


@register(
    "act",
    kind="router",
    paper="arXiv:1603.08983",
    relations=("loop(steps=3, router='act') == loop(steps=1) at halt.bias=inf",),
)
class AdaptiveComputationTime(Router):
    """Adaptive computation time per token (Graves 2016; Universal Transformer, arXiv:1807.03819).

    p_n = sigmoid(w x_n + b) before step n; a token halts at the first n with sum p >= 1 - eps; the output is
    sum_n u_n x_{n+1} with u_n = p_n, the remainder at the halting step. Loss: ponder_coef * mean(n + remainder).
    All steps are computed for every token, because later tokens may read its keys at every step; `copy_halted` makes
    these the keys of the state in which it halted, which is copied forward (the paper), instead of one that goes on
    (its code).
    Useful: 2 D FLOPs a token and step; the body runs all steps on all tokens, halted or not.
    """

    takes_all = True  # and the mean of the ponder loss over slices is that over the row
    segmented = True

    def __init__(
        self,
        dim: int,
        *,
        eps: Annotated[float, Range(gt=0, lt=1)] = 0.01,
        ponder_coef: NonNegativeFloat = 0.01,
        bias_start: float = 1.0,
        assign_remainder: bool = True,
        copy_halted: bool = False,
        steps: PositiveInt = 1,
        nested: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__(dim, steps, nested)
        if not nested:
            raise ValueError("act halts the steps of a loop; it cannot choose the body of a route")
        self.eps, self.ponder_coef, self.bias_start = eps, ponder_coef, bias_start
        self.assign_remainder, self.copy_halted = assign_remainder, copy_halted
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
        running = carry["running"] = before < 1
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
        if self.copy_halted:
            if step:
                x = torch.where(carry["running"].unsqueeze(-1), x, carry["state"])
            carry["state"] = x
        carry["output"] = carry["output"] + carry["weight"].unsqueeze(-1) * x
        return x

    def finish(self, x, carry):
        output = carry["output"]
        if self.training:
            self.metrics = {"ponder": carry["ponder"].detach().mean()}
            output = add_auxiliary_loss(output, self.ponder_coef * carry["ponder"].mean())
        return output

    @property
    def assumption(self):
        return "every token takes every step"

    def step_flops(self, tokens):
        return self.steps * super().step_flops(tokens)  # asked before every step

    def activation_elements(self, tokens, entered=False):
        # the stream behind each step that is not the next step's input as well; p, weight, masks of each step
        return tokens * (self.dim * (self.steps if entered else 1) + 5 * self.steps // 2)


@register(
    "exit",
    kind="router",
    paper="arXiv:2502.05171",
    relations=("loop(steps=3, router={'exit': {'threshold': 1e-30}}) == loop(steps=3)",),
)
class EarlyExit(Router):
    """Early exit: at inference a token leaves the loop after the step that hardly changed it.

    latent: |s_n - s_{n-1}| < threshold * |s_n|; kl: KL(p_n || p_{n-1}) < threshold, p_n the distribution that the
    model's final norm and head read off s_n. (Huginn reads it through the coda too, whose cache would have to be
    taken back at every step.) Usual thresholds: 0.03 and 1e-3. Training takes all steps. No parameters.
    Useful: no matrix products; the body is counted with all steps, as if no token left.
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
        # final norm and head, given by the model
        self.readout: tuple[nn.Module, ...] | None = () if metric == "kl" else None

    @property
    def takes_all(self):
        return self.training

    @property
    def assumption(self):
        return "no token leaves before the last step"

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
        for module in self.readout or ():
            x = module(x)
        return x.log_softmax(-1)
