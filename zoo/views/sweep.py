"""A grid of changes to a configuration, and which of its models no other one beats."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from zoo.errors import ConfigError
from zoo.views.page import page

Axis = tuple[str, list[str]]
_OPENING, _CLOSING = "[{(", "]})"


@dataclass(frozen=True)
class Point:
    """One model of the grid, at rows of so many `tokens`. `time` in milliseconds is None where nobody knows it;
    `front`: nothing beats it."""

    settings: dict[str, str]
    tokens: int
    params: int
    active_params: int
    flops: int
    useful_flops: int
    time: float | None
    memory: int
    fits: bool
    front: bool = False

    @property
    def cost(self) -> float:
        """What takes time: the time itself, or the FLOPs where it is not known."""
        return self.flops if self.time is None else self.time

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Refused:
    """A combination that makes no model, and why."""

    settings: dict[str, str]
    reason: str


def axes(settings: Sequence[str]) -> list[Axis]:
    """`key=a,b` -> key, [a, b]. Commas inside brackets or quotes part no values."""
    found: dict[str, list[str]] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        values = [v.strip() for v in _parted(text)]
        if not equals or not key or "" in values:
            raise ConfigError(f"{setting}: write key=value,value,...; a list as a value is bracketed: key=[1,2],[3]")
        if key in found:
            raise ConfigError(f"{setting}: {key} is given twice")
        found[key] = list(dict.fromkeys(values))
    if not any(len(values) > 1 for values in found.values()):
        raise ConfigError("there is nothing to sweep: give several values, as in dim=512,1024")
    return list(found.items())


def _parted(text: str) -> list[str]:
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        else:
            depth += (letter in _OPENING) - (letter in _CLOSING)
        if letter == "," and not quote and depth <= 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def grid(found: Sequence[Axis]) -> list[dict[str, str]]:
    """Every combination, the last key changing fastest."""
    keys = [key for key, _ in found]
    return [dict(zip(keys, values, strict=True)) for values in itertools.product(*(values for _, values in found))]


def with_front(points: Sequence[Point], prefer: Literal["more", "fewer"]) -> list[Point]:
    """The points, cheapest first; those on the Pareto front of time, memory and parameters are marked: no other is as
    good in all three and better in one."""
    sign = -1 if prefer == "more" else 1
    marks = [(p.cost, p.memory, sign * p.params) for p in points]

    def beaten(mine: tuple) -> bool:
        return any(other != mine and all(a <= b for a, b in zip(other, mine, strict=True)) for other in marks)

    made = [replace(p, front=not beaten(mine)) for p, mine in zip(points, marks, strict=True)]
    return sorted(made, key=lambda p: (p.cost, p.memory))


def sweep_page(
    name: str, title: str, found: Sequence[Axis], points: Sequence[Point], refused: Sequence[Refused],
    memory: float, prefer: str,
) -> str:  # fmt: skip
    """The page of a sweep."""
    data = {
        "name": name,
        "title": title,
        "memory": memory,
        "prefer": prefer,
        "keys": [key for key, values in found if len(values) > 1],
        "points": [p.as_dict() for p in points],
        "refused": [asdict(r) for r in refused],
    }
    return page("sweep", f"{name}: sweep", data)
