"""What a relation on a card says: "gla(gate='none') == linear_attention()", and how its text is read.

Both sides are blocks with their options. The left side takes over the right side's parameters by name. Where the two
are equal only at a limit of their parameters, that is named after `at`:

    a() == b() at gate.bias=-inf, scale[:4]=1, norm=identity, in_proj.weight[8:16]=v_proj.weight

A number fills a parameter, or the part of it that a slice names, on each side that has it; `eye` makes it the identity
matrix; `identity` replaces a module by one that returns its first input; a name is a parameter of the right side, which
the left side keeps at this place. A target names every parameter or module whose name ends with it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_PLACE = re.compile(r"(?P<name>[A-Za-z_]\w*(?:\.\w+)*)(?:\[(?P<index>[\d:,\s-]+)\])?")


@dataclass(frozen=True)
class Place:
    """A parameter or module by (the end of) its name, and which part of it."""

    name: str
    index: tuple[int | slice, ...] = ()

    def names(self, full: str) -> bool:
        """Whether it means the parameter or module of this full name."""
        return full == self.name or full.endswith("." + self.name)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Relation:
    """left == right at settings; a side is a block's name with its options."""

    left: tuple[str, Mapping[str, Any]]
    right: tuple[str, Mapping[str, Any]]
    settings: tuple[tuple[Place, float | Place], ...] = ()

    @property
    def skipped(self) -> tuple[Place, ...]:
        """Modules that let their input pass."""
        return tuple(target for target, value in self.settings if value == Place("identity"))


def parse(text: str) -> Relation:
    """ValueError, with the text, where it cannot be read."""
    equation, at, settings = text.partition(") at ")
    try:
        tree = ast.parse(equation + ")" * bool(at), mode="eval").body
        match tree:
            case ast.Compare(left=left, ops=[ast.Eq()], comparators=[right]):
                return Relation(_call(left), _call(right), tuple(map(_setting, _split(settings) if at else ())))
    except (SyntaxError, ValueError, TypeError) as error:
        raise ValueError(f"relation {text!r} cannot be read: {error}") from None
    raise ValueError(f"relation {text!r} is no equation 'name(option=value) == name(option=value)'")


def _call(node: ast.expr) -> tuple[str, dict[str, Any]]:
    match node:
        case ast.Call(func=ast.Name(id=name), args=[], keywords=keywords) if all(k.arg for k in keywords):
            return name, {str(k.arg): ast.literal_eval(k.value) for k in keywords}
    raise ValueError(f"'{ast.unparse(node)}' is no call with keyword options")


def _split(settings: str) -> list[str]:
    return re.split(r",(?![^\[]*\])", settings)


def _setting(text: str) -> tuple[Place, float | Place]:
    target, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"'{text.strip()}' is no setting 'name=value'")
    try:
        return _place(target), float(value)
    except ValueError:
        return _place(target), _place(value)


def _place(text: str) -> Place:
    match = _PLACE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"'{text.strip()}' names no parameter")
    return Place(match["name"], tuple(map(_item, match["index"].split(","))) if match["index"] else ())


def _item(text: str) -> int | slice:
    bounds = [int(t) if t.strip() else None for t in text.split(":")]
    if len(bounds) == 1 and bounds[0] is not None:
        return bounds[0]
    return slice(*bounds)
