"""What cards tell beyond their fields: the table of options and the family tree. `zoo show` and the docs read it."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from zoo import registry
from zoo.registry import CONTEXT_OPTIONS
from zoo.relation import parse
from zoo.schema import Range, type_name


# -------------------------------------------------------------------------------------------- options
def option_table(name: str) -> list[dict[str, Any]]:
    """Name, type in words, whether it is required, and default of each option of a block (imports its module)."""
    hidden = () if registry.block_card(name).kind == "combinator" else CONTEXT_OPTIONS
    rows = []
    for option in registry.options(name).values():
        if option.name not in hidden:
            row = {"name": option.name, "type": type_in_words(option.annotation), "required": option.required}
            rows.append(row if option.required else row | {"default": option.default})
    return rows


def type_in_words(annotation: Any) -> str:
    """A type with its bounds: `an integer >= 1 or null`."""
    args = typing.get_args(annotation)
    if hasattr(annotation, "__metadata__"):
        signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
        given = [dataclasses.asdict(m) for m in annotation.__metadata__ if isinstance(m, Range)]
        bounds = ", ".join(f"{signs[k]} {v:g}" for d in given for k, v in d.items() if v is not None)
        return f"{type_in_words(args[0])} {bounds}".strip()
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return " or ".join(map(type_in_words, args))
    if typing.get_origin(annotation) in (list, tuple) and args:
        return f"a list of {type_in_words(args[0])}"
    return type_name(annotation)


# --------------------------------------------------------------------------------------------- family
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
        card = registry.block_card(name)
        for relation in card.relations:
            try:
                found = parse(relation)
            except ValueError:  # a stranger's; the conformance suite complains
                continue
            # a component or a router is an option of the left side
            inside = card.kind in (*registry.COMPONENTS, "router")
            yield name if inside else found.left[0], found.right[0], relation


def _follow(edges: list[tuple[str, str, str]], name: str, down: bool, seen: tuple[str, ...]) -> tuple[Member, ...]:
    found = []
    for left, right, relation in edges:
        here, there = (left, right) if down else (right, left)
        if here == name and there not in seen:
            found.append(Member(relation, there, _follow(edges, there, down, (*seen, there))))
    return tuple(found)
