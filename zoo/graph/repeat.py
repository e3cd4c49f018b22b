"""Copies of a node, with their own or tied weights."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Literal

from zoo.graph.nodes import Sequence
from zoo.graph.spec import Spec
from zoo.registry import register
from zoo.schema import PositiveInt, Range

Tie = Literal["none", "all", "cycle", "sequence", "middle_cycle", "middle_sequence"]


def tie_order(times: int, unique: int, tie: str) -> tuple[int, ...]:
    """Which of `unique` weight sets copy l uses (MoR, arXiv:2507.10524): cycle l mod base; sequence
    l // (times / base); the middle_ forms keep the first and the last copy to themselves. ValueError where
    the copies do not divide evenly."""
    if tie in ("none", "all"):
        return tuple(range(times)) if tie == "none" else (0,) * times
    ends = 1 if tie.startswith("middle_") else 0
    inner, base = times - 2 * ends, unique - 2 * ends
    if base < 1 or inner < base or inner % base:
        raise ValueError(f"tie: {tie} cannot spread {times} copies over {unique} unique ones evenly")
    rounds = inner // base
    middle = [i % base if tie.endswith("cycle") else i // rounds for i in range(inner)]
    return (0,) * ends + tuple(m + ends for m in middle) + (unique - 1,) * ends


def chosen(selector: object, times: int) -> Iterator[int]:
    """Copies that a key of `at` names: 3, -1, "1,3", "odd", "even", "::6" or "2:8:2". ValueError otherwise."""
    for part in str(selector).replace(" ", "").split(","):
        if part in ("odd", "even"):
            yield from range(part == "odd", times, 2)
        elif re.fullmatch(r"-?\d{1,6}", part):
            index = int(part)
            if not -times <= index < times:
                raise ValueError(f"copy {index} does not exist; there are {times} copies")
            yield index % times
        elif re.fullmatch(r"(-?\d{0,6}):(-?\d{0,6})(:-?\d{0,6})?", part):
            bounds = [int(b) if b not in ("", "-") else None for b in part.split(":")]
            if len(bounds) == 3 and bounds[2] == 0:
                raise ValueError(f"the step of {part!r} is zero")
            yield from range(times)[slice(*bounds)]
        else:
            raise ValueError(f"{part!r} is no copy number, slice, odd or even")


@register(
    "repeat",
    kind="combinator",
    relations=(
        "repeat(times=3, tie='cycle', unique=3) == repeat(times=3)",
        "repeat(times=3, tie='sequence', unique=3) == repeat(times=3)",
        "repeat(times=4, tie='middle_cycle', unique=4) == repeat(times=4)",
        "repeat(times=4, tie='middle_sequence', unique=3) == repeat(times=4, tie='middle_cycle', unique=3)",
        "repeat(times=3, tie='all') == repeat(times=3, tie='cycle', unique=1)",
        "repeat(times=2) == sequence()",
    ),
)
class Repeat(Sequence):
    """Copies of a node: x -> f_n(... f_1(x)), each with its own weights unless tied.

    Fields: `repeat` (or `times`): how many; `of`: the node; `tie`: none, all (one set of weights), cycle,
    sequence, middle_cycle, middle_sequence over `unique` sets; `at`: {copies: node} puts other nodes in some
    places (`7`, `-1`, `"3,5"`, `odd`, `"2::6"`). A number given as a list in an option follows the depth.
    Useful: the sum of its copies; the weights of tied ones count once.
    """

    main_field = "times"

    def __init__(
        self,
        items: list,
        order: tuple[int, ...] = (),
        label: str = "",
        *,
        times: Annotated[int, Range(ge=1, le=10_000)],
        tie: Tie = "none",
        unique: PositiveInt | None = None,
    ):
        super().__init__(items, order, label)

    @staticmethod
    def parse(fields) -> Spec | None:
        parser, path = fields.parser, fields.path
        at = fields.take("at", {})
        fields.take("of", required=True)
        options = fields.options()
        times, tie, unique = options.get("times"), options.get("tie", "none"), options.get("unique")
        if times is None or "of" not in fields.values:
            return None
        try:
            if (unique is not None) != (tie not in ("none", "all")):
                raise ValueError("`unique` goes with tie: cycle, sequence, middle_cycle or middle_sequence")
            order = tie_order(times, unique or times, tie)
        except ValueError as error:
            parser.complain(fields.at("tie"), str(error))
            return None
        places = Repeat._places(fields, at, times)
        if places and tie != "none":
            parser.complain(fields.at("at"), "`at` needs copies with weights of their own (tie: none)")
        copies = []
        for index in range(max(order) + 1):
            with parser.copy_of(index, max(order) + 1):
                value, where = places.get(index, (fields.values["of"], fields.at("of")))
                copies.append(parser.sequence(value, where))
        children = tuple(c for c in copies if c)
        if tie == "none":
            return Spec("sequence", path, children=children)
        return Spec("repeat", path, options=options, children=children, order=order)

    @staticmethod
    def _places(fields, at, times: int) -> dict:
        if not isinstance(at, dict):
            fields.parser.complain(fields.at("at"), f"must be a mapping of copies to nodes, got {at!r}")
            return {}
        places = {}
        for selector, node in at.items():
            where = (*fields.at("at"), selector)
            try:
                places.update({i: (node, where) for i in chosen(selector, times)})
            except ValueError as error:
                fields.parser.complain(where, str(error))
        return places

    @classmethod
    def from_spec(cls, spec, builder):
        return cls([builder.node(c) for c in spec.children], spec.order, spec.label, **spec.options)
