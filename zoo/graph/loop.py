"""A body applied several times with the same weights; a router may let tokens leave early."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from zoo.contract import Pick, Router, State, init_linear_, refuse_packed_streaming
from zoo.graph.gather import run_picked, run_reading, shared_keys
from zoo.graph.nodes import Builder, Composite, Leaf, Sequence
from zoo.graph.routed import (
    RoutedState,
    cannot_share_keys,
    not_segmented,
    picked_leaves,
    reading_leaves,
    routing_leaf,
    stateless,
    sum_leaves,
    token_positions,
)
from zoo.graph.spec import Spec
from zoo.kernels.linear import Linear
from zoo.registry import register
from zoo.row import drawn
from zoo.schema import PositiveFloat, PositiveInt, Range

START_STD = 0.4**0.5  # Huginn's: that of its embeddings, variance 2 / (5 D), after their scale sqrt(D)


@register(
    "loop",
    kind="combinator",
    paper="arXiv:1807.03819",
    relations=(
        "loop(steps=1) == sequence()",
        "loop(steps=3) == repeat(times=6, tie='cycle', unique=2)",
        "loop(steps=3, tie='sequence') == repeat(times=6, tie='sequence', unique=2)",
        "loop(steps=1, kv='first') == sequence()",
        "loop(steps=3, ring=3) == loop(steps=3)",
    ),
)
class Loop(Composite):
    """The same body several times: s <- body(s), the loop of Universal and looped transformers and of Huginn.

    Fields: `steps`; `of`: the body; `router`: fixed, act, exit, expert_choice, token_choice (which tokens take
    which step); `inject`: every step reads the loop's input e too, as body(s + e) (add) or body(A [s; e]) (concat),
    and s starts from zeros or noise (`start`); `step_signal`: a sinusoid or learned vector per step, or the Universal
    Transformer's sinusoids of position and step (coordinate); `final_norm`: a norm of the output; `grad_last`: only
    the last steps keep gradients; `sample_sigma`: training draws the number of steps, 1 + Poisson(rate),
    ln rate ~ N(ln steps - sigma^2 / 2, sigma^2), from torch's CPU generator, so that ranks seeded alike agree.
    Training draws noise per token; eval() starts every token from one draw, kept as a buffer. `tie: sequence`: of the
    body's n nodes step r runs number (r n + j) // steps for j = 0 .. n - 1, so each node runs `steps` times in a row
    (Mixture-of-Recursions; its middle_ forms are layers before and behind the loop); `cycle` runs all in every step.

    Every step keeps its own state, in which tokens that left earlier are missing. `ring: m` keeps m states: step n
    puts a token's entry of step n - m out of state n mod m, so that later tokens read the last entry it left there.
    They need its end before their beginning: eval() and streaming go token by token, training goes in parallel as
    without a ring. A ring of at least `steps` changes nothing. `kv: first` (recursive sharing): one state and one set
    of keys, those of the first step, which every later step queries instead of making its own.

    `on_step(number, s)`, if set, is called in training after every step that keeps gradients and can put a loss on s:
    looped transformers are trained on the mean over their last steps.
    Useful: the body's once for every step, on the share of tokens that the router expects there; of the steps
    before `grad_last` forward alone; the map of inject: concat 4 D^2 FLOPs a token and step.
    """

    main_field = "steps"
    sees_blocks = True

    def __init__(
        self,
        body: nn.Module,
        router: Router,
        dim: int,
        final_norm: nn.Module | None = None,
        *,
        steps: Annotated[int, Range(ge=1, le=1024)],
        inject: Literal["none", "add", "concat"] = "none",
        step_signal: Literal["none", "sinusoid", "learned", "coordinate"] = "none",
        start: Literal["zeros", "noise"] = "zeros",
        grad_last: PositiveInt | None = None,
        sample_sigma: PositiveFloat | None = None,
        ring: PositiveInt | None = None,
        kv: Literal["own", "first"] = "own",
        tie: Literal["cycle", "sequence"] = "cycle",
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.body: Any = body
        self.router, self.dim, self.final_norm = router, dim, final_norm
        self.steps, self.inject, self.grad_last, self.sample_sigma = steps, inject, grad_last, sample_sigma
        self.ring = ring if ring and ring < steps else None
        self.shares_keys = kv == "first"
        # a tuple, so that the body's parts have one place and one name
        self.parts = _parts(body, steps) if tie == "sequence" else ()
        factory = {"device": device, "dtype": dtype}
        self.inject_proj = Linear(2 * dim, dim, bias=False, **factory) if inject == "concat" else None
        self.step_signal = nn.Parameter(torch.empty(steps, dim, **factory)) if step_signal == "learned" else None
        self.sinusoid, self.coordinate = step_signal == "sinusoid", step_signal == "coordinate"
        self.start: Tensor | None
        self.register_buffer("start", torch.empty(dim, **factory) if start == "noise" else None)
        self.on_step: Callable[[int, Tensor], None] | None = None

    @staticmethod
    def parse(fields) -> Spec | None:
        body, router, norm = fields.body(), fields.router("fixed"), fields.take("final_norm")
        if norm is not None:
            norm = fields.parser.norm(norm, fields.at("final_norm"))
        options = fields.options()
        if body is None or router is None or "steps" not in options:
            return None
        for key, why in Loop._complaints(options, router, body):
            fields.parser.complain(fields.at(key), why)
        return Spec("loop", fields.path, options=options, children=(body,), router=router, norm=norm)

    @staticmethod
    def _complaints(options: Mapping, router: Spec, body: Spec) -> Iterator[tuple[str, str]]:
        """Fields that do not go together, each with the reason."""
        inject, sampled = options.get("inject", "none") != "none", bool(options.get("sample_sigma"))
        if inject and router.name not in ("fixed", "act", "exit"):
            yield "inject", f"inject needs every token in every step, not {router.name}"
        if options.get("start") == "noise" and not inject:
            yield "start", "a loop without inject starts from its input; add inject: add or concat"
        if sampled and router.name not in ("fixed", "exit"):
            yield "sample_sigma", f"{router.name} plans a fixed number of steps; use router: fixed or exit"
        if sampled and options.get("step_signal") == "learned":
            yield "sample_sigma", "there may be more steps than learned signals; use step_signal: sinusoid"
        if options.get("tie") == "sequence":
            for key in ("ring", "sample_sigma"):
                if options.get(key):
                    yield "tie", f"tie: sequence gives every step its own nodes, {key} expects the same in all"
        if options.get("kv") == "first":
            for key in ("ring", "grad_last"):
                if options.get(key):
                    yield "kv", f"kv: first keeps the keys of step 0 with their gradient, {key} does not"
            if options.get("tie") == "sequence":
                yield "kv", "kv: first lets every step query the keys of its own nodes; use tie: cycle"
            capacity = router.options.get("capacity") or (0.125 if router.name == "mod" else 1.0)
            if (capacity[0] if isinstance(capacity, (list, tuple)) else capacity) < 1:
                yield "kv", "kv: first needs the keys of every token; let the first capacity of the router be 1.0"
            if why := cannot_share_keys(body):
                yield "kv", why

    @classmethod
    def from_spec(cls, spec: Spec, builder: Builder) -> Loop:
        # the parser gives every one a router
        router = builder.component(spec.router or Spec("fixed"), steps=spec.options["steps"], nested=True)
        norm = builder.component(spec.norm) if spec.norm else None
        return cls(builder.node(spec.children[0]), router, builder.dim, norm, **spec.options, **builder.factory)

    @property
    def expectation(self) -> str:
        """What predicted costs take for granted."""
        if self.sample_sigma is None:
            return ""
        return f"loop: {self.steps} steps, as in eval(); training draws {self.steps + 1} on average"

    @property
    def sliceable(self) -> bool:
        return self.router.takes_all and (self.ring is None or self.training)

    @property
    def cuts_gradient(self) -> str:
        if not self.router.segmented:
            return not_segmented(self.router)
        if self.ring is not None:
            return "ring runs token by token where rows come in segments"
        return "it draws whole rows" if self.sample_sigma or self.start is not None else ""

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
        learning = self.training and state is None
        steps = self._draw_steps() if learning else self.steps
        before = [s.snapshot() for s in state.children] if self.ring and state else []
        keys = None
        if self.shares_keys:
            keys = shared_keys(state.children[0] if state else self.body.init_state(1, 1), state is not None)
        for step in range(steps):
            early = self.grad_last is not None and step < steps - self.grad_last
            with torch.no_grad() if early else contextlib.nullcontext():
                inner = self._enter(step, x, entry, positions)
                pick = self.router.pick(step, inner, carry, state is not None)
                slot = step % len(state.children) if state else 0
                inside = state and state.children[slot]
                if state and before and step >= len(before):
                    _rewind(state.children[slot], before[slot], pick)
                if keys is None:
                    increment = run_picked(self._part(step), pick, inner, inside, positions, doc_ids)
                else:
                    increment = run_reading(self.body, pick, inner, keys, positions, doc_ids)
                x = self.router.advance(step, inner, increment, carry)
            if learning and not early and self.on_step is not None:
                self.on_step(step, x)
        return self.router.finish(x, carry)

    def _part(self, step: int) -> Any:
        """What a step runs."""
        return self.parts[step] if self.parts else self.body

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
        return drawn(x.shape, lambda shape: _noise_(x.new_empty(shape))) if self.training else self.start.expand_as(x)

    def _draw_steps(self) -> int:
        if self.sample_sigma is None:
            return self.steps
        normal = torch.randn((), device="cpu")
        rate = torch.exp(math.log(self.steps) + self.sample_sigma * (normal - self.sample_sigma / 2))
        return 1 + int(torch.poisson(rate))

    def _enter(self, step: int, x: Tensor, entry: Tensor, positions: Tensor) -> Tensor:
        if self.inject == "add":
            x = x + entry
        elif self.inject_proj is not None:
            x = self.inject_proj(torch.cat([x, entry], -1))
        if self.step_signal is not None:
            x = x + self.step_signal[step]
        elif self.sinusoid or self.coordinate:
            x = x + _sinusoid(positions.new_tensor(step + 1), self.dim, x)
        return x + _sinusoid(positions, self.dim, x) if self.coordinate else x

    @property
    def _states(self) -> int:
        return 1 if self.shares_keys else self.ring or self.steps

    def init_state(self, batch_size, max_len=None):
        device = next(self.body.parameters()).device
        seen = torch.zeros(batch_size, dtype=torch.int64, device=device)
        return RoutedState(seen, [self._part(i).init_state(batch_size, max_len) for i in range(self._states)])

    def leaves(self, batch_size, seq_len, context_len, mode, path=""):
        inside = f"{path}.body".strip(".")
        total: list[Leaf] = []
        for step in range(self.steps):
            where = (self.router.share(step), batch_size, seq_len, context_len)
            if self.ring is not None and mode != "train":
                run = self._ring_leaves(*where, inside)
            elif self.shares_keys and step:
                run = reading_leaves(self.body, *where, mode, inside)
            else:
                early = mode == "train" and self.grad_last is not None and step < self.steps - self.grad_last
                as_mode = "prefill" if early else mode  # forward only
                at = f"{path}.step{step}".strip(".") if self.parts else inside
                run = picked_leaves(self._part(step), *where, as_mode, at)
            kept = mode != "train" and step < self._states
            run = run if kept else [stateless(leaf) for leaf in run]
            total = [*total, *run] if self.parts else sum_leaves(total, run)
        yield from total
        backward = self.steps if self.grad_last is None else min(self.grad_last, self.steps)
        runs = self.steps + (2 * backward if mode == "train" else 0)
        entered = self.inject != "none" or self.step_signal is not None or self.sinusoid or self.coordinate
        where = (batch_size, seq_len, mode, path)
        yield routing_leaf(self, self.router, *where, self.inject_proj, runs, backward, entered)

    def _ring_leaves(self, share, batch_size, seq_len, context_len, path) -> list[Leaf]:
        run: list[Leaf] = []
        for t, tokens in _sampled(seq_len):
            token = picked_leaves(self.body, share, batch_size, 1, context_len + t, "decode", path)
            often = [Leaf(leaf.path, leaf.block, leaf.cost.of_share(tokens), leaf.module) for leaf in token]
            run = sum_leaves([stateless(leaf) for leaf in run], often)
        return run


def _sampled(tokens: int) -> Iterator[tuple[int, float]]:
    """Places among so many tokens, and for how many each one stands: of long rows 65, with straight lines between."""
    step = max(1, -(-(tokens - 1) // 64))
    places = [*range(0, tokens - 1, step), tokens - 1]
    for before, t, after in zip([0, *places], places, [*places[1:], tokens - 1], strict=False):
        # half the way to either neighbour; the first and the last for themselves
        yield t, (1 if before == t else (t - before + 1) / 2) + (1 if after == t else (after - t + 1) / 2) - 1


def _parts(body: Any, steps: int) -> tuple[Sequence, ...]:
    """For every step the nodes that `tie: sequence` gives it."""
    while len(body.items) == 1 and isinstance(body.items[0], Sequence) and not body.items[0].is_layer:
        body = body.items[0]
    nodes = [body.items[i] for i in body.order]
    return tuple(Sequence([nodes[(r * len(nodes) + j) // steps] for j in range(len(nodes))]) for r in range(steps))


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


def _sinusoid(place: Tensor, dim: int, like: Tensor) -> Tensor:
    rates = torch.exp(torch.arange(0, dim, 2, device=like.device, dtype=torch.float32) * (-math.log(1e4) / dim))
    angles = place.unsqueeze(-1) * rates
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(-2)[..., :dim].to(like.dtype)
