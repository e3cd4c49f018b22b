"""Latents that re-enter the network that made them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from zoo.contract import Cost, Pick
from zoo.graph.gather import run_picked
from zoo.graph.nodes import Builder, Composite, Leaf
from zoo.graph.routed import RoutedState, token_positions
from zoo.graph.spec import Spec
from zoo.kernels.linear import Linear
from zoo.registry import register
from zoo.schema import Range

HALT_BIAS = -5.0  # nothing halts before it is trained to
Count = Annotated[int, Range(ge=1, le=64)]


@register(
    "feedback",
    kind="combinator",
    paper="arXiv:2510.04871",
    relations=("feedback(inner=1, outer=1) == loop(steps=2) at y_start=0, z_start=0",),
)
class Feedback(Composite):
    """Two latents that one small network improves by turns, the Tiny Recursive Model: an answer y, a thought z.

    A cycle: `inner` times z <- f(x + y + z), then y <- f(y + z). A segment: `outer` cycles, of which only the last
    has gradients. `segments` of them, y and z detached between; y of the last is the output. Both start from one
    fixed normal vector each, kept as buffers. Fields: `feedback` (or `of`): f; `inner`, `outer`, `segments`; `halt`:
    a head q(y) per token; at inference a token with q > 0 takes no further segment.

    Deep supervision: `on_segment(number, y, q)`, if set, is called after every segment (q is None without `halt`)
    and can put a loss on y and q, whose gradient stays inside the segment; without it only the last segment is
    trained, and q not at all. Every call of f keeps its own state, in which halted tokens are missing. The paper's
    f sees whole puzzles, f here is as causal as its blocks, and q is read at every token instead of the first.
    `feedback(inner=1, outer=1)` is f(y + f(x + y + z)).
    Useful: the network's segments * outer * (inner + 1) times, of which training sends the last cycle back; `halt`
    is read between segments, and no token is counted as halted.
    """

    def __init__(
        self,
        body: nn.Module,
        dim: int,
        *,
        inner: Count = 6,
        outer: Count = 3,
        segments: Count = 1,
        halt: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.body: Any = body
        self.dim, self.inner, self.outer, self.segments = dim, inner, outer, segments
        factory = {"device": device, "dtype": dtype}
        self.halt = Linear(dim, 1, bias=True, **factory) if halt else None
        self.y_start: Tensor
        self.z_start: Tensor
        self.register_buffer("y_start", torch.empty(dim, **factory))
        self.register_buffer("z_start", torch.empty(dim, **factory))
        self.on_segment: Callable[[int, Tensor, Tensor | None], None] | None = None

    @staticmethod
    def parse(fields) -> Spec | None:
        body = fields.body()
        options = fields.options()
        return body and Spec("feedback", fields.path, options=options, children=(body,))

    @classmethod
    def from_spec(cls, spec: Spec, builder: Builder) -> Feedback:
        return cls(builder.node(spec.children[0]), builder.dim, **spec.options, **builder.factory)

    @property
    def sliceable(self) -> bool:
        return self.training or self.halt is None or self.segments == 1

    def extra_repr(self) -> str:
        return f"inner={self.inner}, outer={self.outer}, segments={self.segments}"

    def reset_own_parameters(self) -> None:
        for start in (self.y_start, self.z_start):
            nn.init.trunc_normal_(start)
        if self.halt is not None:
            nn.init.zeros_(self.halt.weight)
            nn.init.constant_(self.halt.bias, HALT_BIAS)

    def forward(self, x, *, state: Any = None, positions=None, doc_ids=None):
        positions = token_positions(x, state, positions, doc_ids)
        inside = iter(state.children) if state else None
        y, z = self.y_start.expand_as(x), self.z_start.expand_as(x)
        active = None  # all of them

        def f(old: Tensor, h: Tensor) -> Tensor:
            here = next(inside) if inside else None
            new = h + run_picked(self.body, Pick(mask=active), h, here, positions, doc_ids)
            return new if active is None else torch.where(active.unsqueeze(-1), new, old)

        for segment in range(self.segments):
            y, z = y.detach(), z.detach()
            for cycle in range(self.outer):
                with contextlib.nullcontext() if self._trained(segment, cycle) else torch.no_grad():
                    for _ in range(self.inner):
                        z = f(z, x + y + z)
                    y = f(y, y + z)
            if self.on_segment is not None:
                self.on_segment(segment, y, self.halt and self.halt(y).squeeze(-1))
            if self.halt is not None and segment < self.segments - 1 and not (self.training and state is None):
                running = self.halt(y).squeeze(-1) <= 0
                active = running if active is None else active & running
        return y

    def _trained(self, segment: int, cycle: int) -> bool:
        heard = self.on_segment is not None or segment == self.segments - 1
        return heard and cycle == self.outer - 1

    @property
    def assumption(self) -> str:
        """What predicted costs take for granted."""
        return "" if self.halt is None else "feedback: no token halts before the last segment"

    @property
    def calls(self) -> int:
        """How often the network runs."""
        return self.segments * self.outer * (self.inner + 1)

    def init_state(self, batch_size, max_len=None):
        seen = torch.zeros(batch_size, dtype=torch.int64, device=self.y_start.device)
        return RoutedState(seen, [self.body.init_state(batch_size, max_len) for _ in range(self.calls)])

    def leaves(self, batch_size, seq_len, context_len, mode, path=""):
        trained = 0
        if mode == "train":
            trained = sum(self._trained(s, c) for s in range(self.segments) for c in range(self.outer))
            trained *= self.inner + 1
        where = (batch_size, seq_len, context_len)
        inside = f"{path}.body".strip(".")
        with_gradient = self.body.leaves(*where, "train", inside)
        forward_only = self.body.leaves(*where, "prefill" if mode == "train" else mode, inside)
        for a, b in zip(with_gradient, forward_only, strict=True):
            once = b.cost.replace(state_bytes=0) if mode == "train" else b.cost
            yield Leaf(a.path, a.block, _times(a.cost, trained, once, self.calls - trained), a.module)
        flops, own = 0, 0
        if self.halt is not None:
            own = sum(p.numel() for p in self.halt.parameters())
            reads = (self.segments - 1) if mode != "train" else 3 * self.segments * (self.on_segment is not None)
            flops = 2 * reads * batch_size * seq_len * self.dim
        seen = 0 if mode == "train" else 8 * batch_size
        where = f"{path}.router" if self.halt is not None else f"{path}.latents"
        # every call reads a sum of up to three streams and adds its increment; trained ones go back
        tokens, item = batch_size * seq_len * self.dim, self.y_start.element_size()
        passes = self.calls + 2 * trained
        cost = Cost(
            own, own, flops, bytes_read=item * (4 * passes * tokens + own), bytes_written=item * 2 * passes * tokens,
            state_bytes=seen, useful_flops=flops, vector_flops=3 * passes * tokens,
        )  # fmt: skip
        yield Leaf(where.strip("."), "feedback", cost, self)


def _times(a: Cost, n: int, b: Cost, m: int) -> Cost:
    """n a + m b, the same weights each time."""
    pairs = zip(dataclasses.astuple(a), dataclasses.astuple(b), strict=True)
    return Cost(*(n * x + m * y for x, y in pairs)).replace(params=a.params, active_params=a.active_params)
