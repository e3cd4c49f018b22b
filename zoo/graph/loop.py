"""A body applied several times with the same weights; a router may let tokens leave early."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from zoo.contract import Cost, Pick, Router, State, init_linear_, positions_from, refuse_packed_streaming
from zoo.graph.gather import run_picked
from zoo.graph.nodes import Builder, Composite, Leaf
from zoo.graph.spec import Spec
from zoo.kernels.linear import Linear
from zoo.registry import register
from zoo.schema import PositiveFloat, PositiveInt, Range

START_STD = 0.4**0.5  # Huginn's: that of its embeddings, variance 2 / (5 D), after their scale sqrt(D)


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
    """The same body several times: s <- body(s), the loop of Universal and looped transformers and of Huginn.

    Fields: `steps`; `of`: the body; `router`: fixed, act, exit, expert_choice, token_choice (which tokens take
    which step); `inject`: every step reads the loop's input e too, as body(s + e) (add) or body(A [s; e]) (concat),
    and s starts from zeros or noise (`start`); `step_signal`: a sinusoid or learned vector per step; `final_norm`:
    a norm of the output; `grad_last`: only the last steps keep gradients; `sample_sigma`: training draws the
    number of steps, 1 + Poisson(rate), ln rate ~ N(ln steps - sigma^2 / 2, sigma^2), from torch's CPU generator,
    so that ranks seeded alike agree. Training draws noise per token; eval() starts every token from one draw,
    kept as a buffer.

    Every step keeps its own state, in which tokens that left earlier are missing. `ring: m` keeps m states: step n
    puts a token's entry of step n - m out of state n mod m, so that later tokens read the last entry it left there.
    They need its end before their beginning: eval() and streaming go token by token, training goes in parallel as
    without a ring. A ring of at least `steps` changes nothing. `loop(steps=1) == body`.
    """

    main_field = "steps"

    def __init__(
        self,
        body: nn.Module,
        router: Router,
        dim: int,
        final_norm: nn.Module | None = None,
        *,
        steps: Annotated[int, Range(ge=1, le=1024)],
        inject: Literal["none", "add", "concat"] = "none",
        step_signal: Literal["none", "sinusoid", "learned"] = "none",
        start: Literal["zeros", "noise"] = "zeros",
        grad_last: PositiveInt | None = None,
        sample_sigma: PositiveFloat | None = None,
        ring: PositiveInt | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.body: Any = body
        self.router, self.dim, self.final_norm = router, dim, final_norm
        self.steps, self.inject, self.grad_last, self.sample_sigma = steps, inject, grad_last, sample_sigma
        self.ring = ring if ring and ring < steps else None
        factory = {"device": device, "dtype": dtype}
        self.inject_proj = Linear(2 * dim, dim, bias=False, **factory) if inject == "concat" else None
        self.step_signal = nn.Parameter(torch.empty(steps, dim, **factory)) if step_signal == "learned" else None
        self.sinusoid = step_signal == "sinusoid"
        self.start: Tensor | None
        self.register_buffer("start", torch.empty(dim, **factory) if start == "noise" else None)

    @staticmethod
    def parse(fields) -> Spec | None:
        body, router, norm = fields.body(), fields.router("fixed"), fields.take("final_norm")
        if norm is not None:
            norm = fields.parser.norm(norm, fields.at("final_norm"))
        options = fields.options()
        if body is None or router is None or "steps" not in options:
            return None
        complain, inject = fields.parser.complain, options.get("inject", "none") != "none"
        if inject and router.name not in ("fixed", "act", "exit"):
            complain(fields.at("inject"), f"inject needs every token in every step, not {router.name}")
        if options.get("start") == "noise" and not inject:
            complain(fields.at("start"), "a loop without inject starts from its input; add inject: add or concat")
        if options.get("sample_sigma") and router.name not in ("fixed", "exit"):
            complain(
                fields.at("sample_sigma"), f"{router.name} plans a fixed number of steps; use router: fixed or exit"
            )
        if options.get("sample_sigma") and options.get("step_signal") == "learned":
            complain(
                fields.at("sample_sigma"), "there may be more steps than learned signals; use step_signal: sinusoid"
            )
        return Spec("loop", fields.path, options=options, children=(body,), router=router, norm=norm)

    @classmethod
    def from_spec(cls, spec: Spec, builder: Builder) -> Loop:
        # the parser gives every one a router
        router = builder.component(spec.router or Spec("fixed"), steps=spec.options["steps"], nested=True)
        norm = builder.component(spec.norm) if spec.norm else None
        return cls(builder.node(spec.children[0]), router, builder.dim, norm, **spec.options, **builder.factory)

    def extra_repr(self) -> str:
        return f"steps={self.steps}, inject={self.inject}"

    def reset_own_parameters(self) -> None:
        if self.inject_proj is not None:
            init_linear_(self.inject_proj)
        if self.step_signal is not None:
            nn.init.normal_(self.step_signal, std=0.02)
        if self.start is not None:
            _noise_(self.start)

    def forward(self, x, *, state: Any = None, positions=None, doc_ids=None):
        positions = token_positions(x, state, positions, doc_ids)
        if self.ring is None or (self.training and state is None):
            y = self._iterate(x, state, positions, doc_ids)
        else:
            y = self._token_by_token(x, state, positions, doc_ids)
        return y if self.final_norm is None else self.final_norm(y)

    def _iterate(self, x, state, positions, doc_ids):
        entry, carry = x, self.router.start(x)
        if self.inject != "none":
            x = self._first(x)
        steps = self._draw_steps() if self.training and state is None else self.steps
        before = [s.snapshot() for s in state.children] if self.ring and state else []
        for step in range(steps):
            early = self.grad_last is not None and step < steps - self.grad_last
            with torch.no_grad() if early else contextlib.nullcontext():
                inner = self._enter(step, x, entry)
                pick = self.router.pick(step, inner, carry, state is not None)
                slot = step % len(state.children) if state else 0
                inside = state and state.children[slot]
                if before and step >= len(before):
                    _rewind(inside, before[slot], pick)
                increment = run_picked(self.body, pick, inner, inside, positions, doc_ids)
                x = self.router.advance(step, inner, increment, carry)
        return self.router.finish(x, carry)

    def _token_by_token(self, x, state, positions, doc_ids):
        refuse_packed_streaming(state, doc_ids)
        if state is None:
            state = self.init_state(*x.shape[:2])
        outputs = []
        for t, token in enumerate(x.split(1, 1)):
            if doc_ids is not None and t:
                starts = (doc_ids[:, t] != doc_ids[:, t - 1]).nonzero().squeeze(1)
                for inside in state.children:
                    inside.reset(starts)
            outputs.append(self._iterate(token, state, positions[:, t : t + 1], None))
        return torch.cat(outputs, 1)

    def _first(self, x: Tensor) -> Tensor:
        if self.start is None:
            return torch.zeros_like(x)
        return _noise_(torch.empty_like(x)) if self.training else self.start.expand_as(x)

    def _draw_steps(self) -> int:
        if self.sample_sigma is None:
            return self.steps
        normal = torch.randn((), device="cpu")
        rate = torch.exp(math.log(self.steps) + self.sample_sigma * (normal - self.sample_sigma / 2))
        return 1 + int(torch.poisson(rate))

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
        return RoutedState(seen, [self.body.init_state(batch_size, max_len) for _ in range(self.ring or self.steps)])

    def leaves(self, batch_size, seq_len, context_len, mode, path=""):
        inside = f"{path}.body".strip(".")
        total: list[Leaf] = []
        for step in range(self.steps):
            share = self.router.share(step)
            if self.ring is not None and mode != "train":
                run: list[Leaf] = []
                for t in range(seq_len):
                    token = picked_leaves(self.body, share, batch_size, 1, context_len + t, "decode", inside)
                    run = _sum([_stateless(leaf) for leaf in run], token)
            else:
                early = mode == "train" and self.grad_last is not None and step < self.steps - self.grad_last
                as_mode = "prefill" if early else mode  # forward only
                run = picked_leaves(self.body, share, batch_size, seq_len, context_len, as_mode, inside)
            kept = mode != "train" and step < (self.ring or self.steps)
            total = _sum(total, run if kept else [_stateless(leaf) for leaf in run])
        yield from total
        backward = self.steps if self.grad_last is None else min(self.grad_last, self.steps)
        runs = self.steps + (2 * backward if mode == "train" else 0)
        yield routing_leaf(self, self.router, batch_size, seq_len, mode, path, self.inject_proj, runs)


def _noise_(x: Tensor) -> Tensor:
    return nn.init.trunc_normal_(x, std=START_STD, a=-3 * START_STD, b=3 * START_STD)


def _rewind(state: State, before: State, pick: Pick) -> None:
    """Take the current token out of a state again, in the rows that are about to write it anew."""
    if pick.mask is None:
        return state.restore(before)
    done = (~pick.mask).any(1).nonzero().squeeze(1)
    last = state.rows(done)
    state.restore(before)
    state.put_rows(done, last)


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


def _sum(runs: list[Leaf], more: list[Leaf]) -> list[Leaf]:
    """The same weights once more: work and state add up, parameters do not."""
    if not runs:
        return more
    return [
        Leaf(a.path, a.block, a.cost + b.cost.replace(params=0, active_params=0), a.module)
        for a, b in zip(runs, more, strict=True)
    ]


def _stateless(leaf: Leaf) -> Leaf:
    return Leaf(leaf.path, leaf.block, leaf.cost.replace(state_bytes=0), leaf.module)


def routing_leaf(node, router, batch_size, seq_len, mode, path, extra=None, runs=0) -> Leaf:
    """Cost of a combinator's own parameters: its router, and a map `extra` that runs so often (backward is two)."""
    inside = {id(p) for name, child in node.named_children() if name in ("body", "bodies") for p in child.parameters()}
    own = sum(p.numel() for p in node.parameters() if id(p) not in inside)
    tokens = batch_size * seq_len
    flops = router.step_flops(tokens) * (3 if mode == "train" else 1)
    if extra is not None:
        flops += 2 * runs * tokens * extra.weight.numel()
    # the count of tokens seen, int64 per row
    cost = Cost(own, own, flops, state_bytes=0 if mode == "train" else 8 * batch_size)
    return Leaf(f"{path}.router".strip("."), type(router).zoo_registration.name, cost, node)
