"""The family tree of blocks, from the relations on their cards; the conformance suite proves every edge."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from zoo import registry


@dataclass(frozen=True)
class Member:
    """A relative: the relation that leads to it, its name, and its own relatives in the same direction."""

    relation: str
    name: str
    members: tuple[Member, ...] = ()


@dataclass(frozen=True)
class Family:
    """`special`: what a block becomes at some settings. `general`: blocks that become it."""

    name: str
    special: tuple[Member, ...]
    general: tuple[Member, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k != "name"}


def family(name: str) -> Family:
    """Relatives of a block over any number of relations."""
    edges = list(_edges())
    return Family(name, _follow(edges, name, True, (name,)), _follow(edges, name, False, (name,)))


def _edges() -> Iterator[tuple[str, str, str]]:
    for name in registry.list_blocks():
        for relation in registry.block_card(name).relations:
            sides = [_block_of(side) for side in relation.split("==")]
            if len(sides) == 2 and all(sides):
                yield sides[0], sides[1], relation


def _block_of(side: str) -> str:
    try:
        node = ast.parse(side.strip(), mode="eval").body
    except SyntaxError:
        return ""
    node = node.func if isinstance(node, ast.Call) else node
    return node.id if isinstance(node, ast.Name) else ""


def _follow(edges: list[tuple[str, str, str]], name: str, down: bool, seen: tuple[str, ...]) -> tuple[Member, ...]:
    found = []
    for left, right, relation in edges:
        here, there = (left, right) if down else (right, left)
        if here == name and there not in seen:
            found.append(Member(relation, there, _follow(edges, there, down, (*seen, there))))
    return tuple(found)
