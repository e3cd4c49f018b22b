"""A checked document -> `Graph`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zoo.graph.parse import ATTRIBUTES, Parser
from zoo.graph.spec import Graph, Spec, flatten
from zoo.sections import VisionSection


def graph_of(parser: Parser, top: Mapping[str, Any], document: Mapping[str, Any]) -> Graph:
    """The graph of a document whose top-level keys were checked into `top`."""
    parser.define = top.get("define") or {}
    if not isinstance(parser.define, Mapping):
        parser.complain(("define",), f"must be a mapping of names to nodes, got {parser.define!r}")
        parser.define = {}
    for name in parser.define:
        if not isinstance(name, str) or name in {*parser.blocks, *parser.combinators, *ATTRIBUTES, "skip"}:
            parser.complain(("define", name), f"the name {name!r} is taken; choose another")
    parser.default_norm = parser.norm(top.get("norm", "rms"), ("norm",))
    final_norm = parser.default_norm
    if "final_norm" in top:
        final_norm = parser.norm(top["final_norm"], ("final_norm",))
    parser.default_residual = parser.residual(top.get("residual", "pre"), ("residual",))
    trunk = top.get("trunk")
    items: list[Spec] = []
    if not isinstance(trunk, list) or not trunk:
        parser.complain(("trunk",), "the trunk must be a list with at least one node")
    else:
        parsed = [parser.node(v, ("trunk", i)) for i, v in enumerate(trunk)]
        # blocks that stand directly in the trunk form one layer each with their neighbours' definitions kept
        items = [layer for spec in parsed if spec for layer in flatten(spec)]
    for name in parser.define:  # unused definitions are checked too
        if isinstance(name, str) and name not in parser.expanded:
            parser.expand(name, ("define", name))
    vision = None
    if top.get("architecture") == "vision" and not parser.problems:
        vision = VisionSection.from_mapping(top.get("vision"))
    return Graph(
        name=top.get("name", "model"),
        architecture=top.get("architecture", "causal_lm"),
        dim=top.get("dim", 1),
        vocab_size=top.get("vocab_size", 0),
        trunk=tuple(items),
        norm=final_norm,
        tie_embeddings=top.get("tie_embeddings", True),
        embedding_scale=top.get("embedding_scale", 1.0),
        logit_scale=top.get("logit_scale", 1.0),
        logit_cap=top.get("logit_cap"),
        num_layers=max(1, sum(s.kind == "mixer" for i in items for s in i.walk())),
        vision=vision,
        document=document,
    )
