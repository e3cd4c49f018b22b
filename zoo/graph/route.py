"""Tokens choose a body, or skip."""

# pyright: reportCallIssue=false
# (nn.ModuleList forgets the type of its items)
from __future__ import annotations

from typing import Any

import torch
from torch import nn

from zoo import registry
from zoo.contract import Cost, Router
from zoo.graph.gather import run_picked, run_reading, shared_keys
from zoo.graph.nodes import Builder, Composite, Leaf
from zoo.graph.routed import (
    RoutedState,
    cannot_share_keys,
    not_segmented,
    picked_leaves,
    reading_leaves,
    routing_leaf,
    token_positions,
)
from zoo.graph.spec import Spec
from zoo.registry import register


@register(
    "route",
    kind="combinator",
    paper="arXiv:2404.02258",
    relations=("route(router='fixed') == sequence()",),
)
class Route(Composite):
    """Tokens choose bodies: x + w * (body_i(x) - x) at the tokens that body i gets, x elsewhere.

    Fields: `of`: a body, or `bodies`: a list of bodies in which `skip` stands for doing nothing; `router`: mod
    or expert_choice (one body takes its best tokens), token_choice (each token takes one of the bodies), skip_layer
    (each token takes the body or not), fixed. A body sees only the tokens it got, at their own positions, and keeps
    state for those only; with skip_layer its attention sees the others too, as they stood before it.
    Useful: each body on the share of tokens that the router expects there, and the router's.
    """

    main_field = "of"
    sees_blocks = True

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
        if registry.load(router.name).reads_all and (why := Route._cannot_read_all(children)):
            parser.complain(fields.at("router"), f"{router.name}: {why}")
        return Spec("route", fields.path, children=tuple(c for c in children if c), router=router)

    @staticmethod
    def _cannot_read_all(bodies) -> str:
        """Why keys of tokens that skip a body cannot be made from what stands before it, or an empty string."""
        if len(bodies) > 1 or any(s.kind == "combinator" and s.name != "sequence" for s in bodies[0].walk()):
            return "the body is one plain layer"
        blocks = [s for s in bodies[0].walk() if s.kind != "combinator"]
        if any(registry.block_card(s.name).state_growth != "none" for s in blocks[1:]):
            return "a skipped token has no keys for a second mixer; route each layer by itself"
        return cannot_share_keys(bodies[0])

    @classmethod
    def from_spec(cls, spec: Spec, builder: Builder) -> Route:
        # the parser gives every one a router
        router = builder.component(spec.router or Spec("fixed"), steps=len(spec.children), nested=False)
        bodies = [None if c.name == "skip" else builder.node(c) for c in spec.children]
        return cls(bodies, router, builder.dim)

    @property
    def sliceable(self) -> bool:
        return self.router.takes_all

    @property
    def cuts_gradient(self) -> str:
        return "" if self.router.segmented else not_segmented(self.router)

    def forward(self, x, *, state: Any = None, positions=None, doc_ids=None):
        positions = token_positions(x, state, positions, doc_ids)
        entry, carry = x, self.router.start(x)
        for number, (place, body) in enumerate(zip(self.places, self.bodies, strict=True)):
            pick = self.router.pick(place, entry, carry, state is not None)
            inside = state and state.children[number]
            if self.router.reads_all and pick.mask is not None:
                keys = shared_keys(inside or body.init_state(1, 1), inside is not None)  # type: ignore[arg-type]
                body.write_keys(entry, keys, positions, doc_ids)  # type: ignore[operator]
                increment = run_reading(body, pick, entry, keys, positions, doc_ids)  # type: ignore[arg-type]
            else:
                increment = run_picked(body, pick, entry, inside, positions, doc_ids)  # type: ignore[arg-type]
            x = self.router.advance(place, x, increment, carry)
        return self.router.finish(x, carry)

    def init_state(self, batch_size, max_len=None):
        device = next(self.parameters()).device
        seen = torch.zeros(batch_size, dtype=torch.int64, device=device)
        return RoutedState(seen, [b.init_state(batch_size, max_len) for b in self.bodies])

    def leaves(self, batch_size, seq_len, context_len, mode, path=""):
        for number, (place, body) in enumerate(zip(self.places, self.bodies, strict=True)):
            share, where = self.router.share(place), (batch_size, seq_len, context_len, mode)
            at = f"{path}.{number}".strip(".")
            if not self.router.reads_all:
                yield from picked_leaves(body, share, *where, at)
            elif mode == "train":
                yield from picked_leaves(body, 1.0, *where, at)
            else:
                for leaf in reading_leaves(body, share, *where, at):
                    block: Any = leaf.module.block
                    keys = block.key_flops(batch_size * seq_len) if block.shares_keys else 0
                    cost = leaf.cost + Cost(flops=keys, useful_flops=keys)
                    yield Leaf(leaf.path, leaf.block, cost, leaf.module)
        yield routing_leaf(self, self.router, batch_size, seq_len, mode, path)
