"""A body applied several times with the same weights; a router may let tokens leave early."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from zoo.contract import Cost, Router, State, init_linear_, positions_from
from zoo.graph.gather import run_picked
from zoo.graph.nodes import Builder, Composite, Leaf
from zoo.graph.spec import Spec
from zoo.kernels.linear import Linear
from zoo.registry import register
from zoo.schema import PositiveInt, Range


@dataclass
class RoutedState(State):
    """One state of the body per step (or per body), and the tokens seen [B]."""

    seen: Tensor
    children: list[State] = field(default_factory=list)

    def next_positions(self, length: int) -> Tensor:
        """Positions [B, T] of the coming tokens."""
        return self.seen[:, None] + torch.arange(length, device=self.seen.device)


def token_positions(x: Tensor, state: RoutedState | None, positions: Tensor | None, doc_ids: Tensor | None) -> Tensor:
    """Positions of x's tokens: the given ones, or those that continue the state or start each document."""
    if positions is None:
        here = positions_from(doc_ids, x.shape[0], x.shape[1], x.device)
        positions = here if state is None else state.next_positions(x.shape[1])
    if state is not None:
        state.seen += x.shape[1]
    return positions


@register("loop", kind="combinator", paper="arXiv:1807.03819")
class Loop(Composite):
    """The same body several times: s <- s + (body(s) - s), the loop of Universal and looped transformers.

    Fields: `steps`; `of`: the body; `router`: fixed, act, expert_choice, token_choice (which tokens take which
    step); `inject`: add or concat feeds the loop's input into every step, the recurrence then starting from
    zeros; `step_signal`: a sinusoid or learned vector per step; `grad_last`: only the last steps keep gradients.
    Every step keeps its own state. `loop(steps=1) == body`.
    """

    main_field = "steps"

    def __init__(
        self,
        body: nn.Module,
        router: Router,
        dim: int,
        *,
        steps: Annotated[int, Range(ge=1, le=1024)],
        inject: Literal["none", "add", "concat"] = "none",
        step_signal: Literal["none", "sinusoid", "learned"] = "none",
        grad_last: PositiveInt | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.body: Any = body
        self.router, self.dim = router, dim
        self.steps, self.inject, self.grad_last = steps, inject, grad_last
        factory = {"device": device, "dtype": dtype}
        self.inject_proj = Linear(2 * dim, dim, bias=False, **factory) if inject == "concat" else None
        self.step_signal = nn.Parameter(torch.empty(steps, dim, **factory)) if step_signal == "learned" else None
        self.sinusoid = step_signal == "sinusoid"

    @staticmethod
    def parse(fields) -> Spec | None:
        body, router = fields.body(), fields.router("fixed")
        options = fields.options()
        if body is None or router is None or "steps" not in options:
            return None
        if options.get("inject", "none") != "none" and router.name not in ("fixed", "act"):
            fields.parser.complain(fields.at("inject"), f"inject needs every token in every step, not {router.name}")
        return Spec("loop", fields.path, options=options, children=(body,), router=router)

    @classmethod
    def from_spec(cls, spec: Spec, builder: Builder) -> Loop:
        # the parser gives every one a router
        router = builder.component(spec.router or Spec("fixed"), steps=spec.options["steps"], nested=True)
        return cls(builder.node(spec.children[0]), router, builder.dim, **spec.options, **builder.factory)

    def extra_repr(self) -> str:
        return f"steps={self.steps}, inject={self.inject}"

    def reset_own_parameters(self) -> None:
        if self.inject_proj is not None:
            init_linear_(self.inject_proj)
        if self.step_signal is not None:
            nn.init.normal_(self.step_signal, std=0.02)

    def forward(self, x, *, state: Any = None, positions=None, doc_ids=None):
        positions = token_positions(x, state, positions, doc_ids)
        entry, carry = x, self.router.start(x)
        if self.inject != "none":
            x = torch.zeros_like(x)
        for step in range(self.steps):
            early = self.grad_last is not None and step < self.steps - self.grad_last
            with torch.no_grad() if early else contextlib.nullcontext():
                inner = self._enter(step, x, entry)
                pick = self.router.pick(step, inner, carry, state is not None)
                inside = state and state.children[step]
                increment = run_picked(self.body, pick, inner, inside, positions, doc_ids)
                x = self.router.advance(step, inner, increment, carry)
        return self.router.finish(x, carry)

    def _enter(self, step: int, x: Tensor, entry: Tensor) -> Tensor:
        if self.inject == "add":
            x = x + entry
        elif self.inject_proj is not None:
            x = self.inject_proj(torch.cat([x, entry], -1))
        if self.step_signal is not None:
            x = x + self.step_signal[step]
        elif self.sinusoid:
            x = x + _sinusoid(step, self.dim, x)
        return x

    def init_state(self, batch_size, max_len=None):
        device = next(self.body.parameters()).device
        seen = torch.zeros(batch_size, dtype=torch.int64, device=device)
        return RoutedState(seen, [self.body.init_state(batch_size, max_len) for _ in range(self.steps)])

    def leaves(self, batch_size, seq_len, context_len, mode, path=""):
        first: list[Leaf] = []
        for step in range(self.steps):
            share = self.router.share(step)
            run = picked_leaves(self.body, share, batch_size, seq_len, context_len, mode, f"{path}.body".strip("."))
            first = run if not first else [_again(a, b) for a, b in zip(first, run, strict=True)]
        yield from first
        yield routing_leaf(self, self.router, batch_size, seq_len, mode, path, self.inject_proj, self.steps)


def _sinusoid(step: int, dim: int, like: Tensor) -> Tensor:
    rates = torch.exp(torch.arange(0, dim, 2, device=like.device, dtype=torch.float32) * (-math.log(1e4) / dim))
    angles = (step + 1) * rates
    return torch.stack([angles.sin(), angles.cos()], -1).flatten()[:dim].to(like.dtype)


def picked_leaves(body, share, batch_size, seq_len, context_len, mode, path) -> list[Leaf]:
    """Costs of a body that a `share` of the tokens takes. Its state is allocated for all of them."""
    everything = list(body.leaves(batch_size, seq_len, context_len, mode, path))
    if share == 1:
        return everything
    if seq_len == 1:  # decoding: a share of the steps does the work
        return [Leaf(e.path, e.block, _scaled(e.cost, share), e.module) for e in everything]
    part = body.leaves(batch_size, max(1, int(share * seq_len)), round(share * context_len), mode, path)
    return [
        Leaf(p.path, p.block, p.cost.replace(state_bytes=e.cost.state_bytes), p.module)
        for p, e in zip(part, everything, strict=True)
    ]


def _scaled(cost: Cost, share: float) -> Cost:
    return cost.replace(**{k: round(getattr(cost, k) * share) for k in ("flops", "bytes_read", "bytes_written")})


def _again(first: Leaf, more: Leaf) -> Leaf:
    # the same weights once more: work and state add up, parameters do not
    cost = first.cost + more.cost.replace(params=0, active_params=0)
    return Leaf(first.path, first.block, cost, first.module)


def routing_leaf(node, router, batch_size, seq_len, mode, path, extra=None, steps=1) -> Leaf:
    """Cost of a combinator's own parameters: its router and what it mixes in."""
    inside = {id(p) for name, child in node.named_children() if name in ("body", "bodies") for p in child.parameters()}
    own = sum(p.numel() for p in node.parameters() if id(p) not in inside)
    tokens = batch_size * seq_len
    flops = router.step_flops(tokens) + (0 if extra is None else 2 * steps * tokens * extra.weight.numel())
    # the count of tokens seen, int64 per row
    cost = Cost(own, own, flops * (3 if mode == "train" else 1), state_bytes=0 if mode == "train" else 8 * batch_size)
    return Leaf(f"{path}.router".strip("."), type(router).zoo_registration.name, cost, node)
