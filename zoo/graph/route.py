"""Tokens choose a body, or skip."""

# pyright: reportCallIssue=false
# (nn.ModuleList forgets the type of its items)
from __future__ import annotations

from typing import Any

import torch
from torch import nn

from zoo.contract import Router
from zoo.graph.gather import run_picked
from zoo.graph.loop import RoutedState, picked_leaves, routing_leaf, token_positions
from zoo.graph.nodes import Builder, Composite
from zoo.graph.spec import Spec
from zoo.registry import register


@register("route", kind="combinator", paper="arXiv:2404.02258")
class Route(Composite):
    """Tokens choose bodies: x + w * (body_i(x) - x) at the tokens that body i gets, x elsewhere.

    Fields: `of`: a body, or `bodies`: a list of bodies in which `skip` stands for doing nothing; `router`: mod
    or expert_choice (one body takes its best tokens), token_choice (each token takes one of the bodies), fixed.
    A body sees only the tokens it got, at their own positions, and keeps state for those only.
    """

    main_field = "of"

    def __init__(self, bodies: list[nn.Module | None], router: Router, dim: int):
        super().__init__()
        self.bodies = nn.ModuleList(b for b in bodies if b is not None)
        self.places = [i for i, b in enumerate(bodies) if b is not None]
        self.router, self.dim, self.count = router, dim, len(bodies)

    @staticmethod
    def parse(fields) -> Spec | None:
        parser = fields.parser
        values = fields.take("bodies")
        single = fields.take("of")
        router = fields.router("mod")
        fields.options()
        if (values is None) == (single is None):
            parser.complain(fields.path, "route needs either of: one body, or bodies: a list")
            return None
        if values is None:
            children = [parser.sequence(single, fields.at("of"))]
        elif not isinstance(values, list) or not values:
            parser.complain(fields.at("bodies"), f"must be a list of nodes, got {values!r}")
            return None
        else:
            places = [(v, (*fields.at("bodies"), i)) for i, v in enumerate(values)]
            skip = Spec("skip", kind="skip")
            children = [skip if v == "skip" else parser.sequence(v, p) for v, p in places]
            if all(v == "skip" for v in values):
                parser.complain(fields.at("bodies"), "every body is skip; at least one must do something")
        if router is None or any(c is None for c in children):
            return None
        return Spec("route", fields.path, children=tuple(c for c in children if c), router=router)

    @classmethod
    def from_spec(cls, spec: Spec, builder: Builder) -> Route:
        # the parser gives every one a router
        router = builder.component(spec.router or Spec("fixed"), steps=len(spec.children), nested=False)
        bodies = [None if c.name == "skip" else builder.node(c) for c in spec.children]
        return cls(bodies, router, builder.dim)

    def forward(self, x, *, state: Any = None, positions=None, doc_ids=None):
        positions = token_positions(x, state, positions, doc_ids)
        entry, carry = x, self.router.start(x)
        for number, (place, body) in enumerate(zip(self.places, self.bodies, strict=True)):
            pick = self.router.pick(place, entry, carry, state is not None)
            inside = state and state.children[number]
            increment = run_picked(body, pick, entry, inside, positions, doc_ids)  # type: ignore[arg-type]
            x = self.router.advance(place, x, increment, carry)
        return self.router.finish(x, carry)

    def init_state(self, batch_size, max_len=None):
        device = next(self.parameters()).device
        seen = torch.zeros(batch_size, dtype=torch.int64, device=device)
        return RoutedState(seen, [b.init_state(batch_size, max_len) for b in self.bodies])

    def leaves(self, batch_size, seq_len, context_len, mode, path=""):
        for number, (place, body) in enumerate(zip(self.places, self.bodies, strict=True)):
            share = self.router.share(place)
            at = f"{path}.{number}".strip(".")
            yield from picked_leaves(body, share, batch_size, seq_len, context_len, mode, at)
        yield routing_leaf(self, self.router, batch_size, seq_len, mode, path)
