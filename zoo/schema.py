"""Types of options: what an annotation accepts, in checks and in words. The schema of a block is its signature."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from zoo.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Range:
    """Bounds of a number in an option's annotation: `Annotated[int, Range(ge=1)]`."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None

    def complaint(self, value: float) -> str:
        """Empty where `value` is inside, else the words of an error message."""
        for bound, holds, word in (
            (self.ge, lambda b: value >= b, "at least"),
            (self.gt, lambda b: value > b, "greater than"),
            (self.le, lambda b: value <= b, "at most"),
            (self.lt, lambda b: value < b, "less than"),
        ):
            if bound is not None and not holds(bound):
                return f"must be {word} {bound:g}, got {value!r}"
        return ""


PositiveInt = Annotated[int, Range(ge=1)]
NonNegativeInt = Annotated[int, Range(ge=0)]
PositiveFloat = Annotated[float, Range(gt=0)]
NonNegativeFloat = Annotated[float, Range(ge=0)]
Fraction = Annotated[float, Range(gt=0, le=1)]


def accepts_list(annotation: Any) -> bool:
    """Whether an annotation takes a list by itself (so that a list is no depth schedule)."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return accepts_list(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return any(accepts_list(a) for a in typing.get_args(annotation))
    return origin in (list, tuple) or annotation in (list, tuple)


def type_name(annotation: Any) -> str:
    """An annotation in words, for messages and cards."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return type_name(args[0])
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_name(a) for a in args)
    if origin in (list, tuple):
        return f"a list of {type_name(args[0])}" if args else "a list"
    if origin is dict or annotation is dict or hasattr(annotation, "from_mapping"):
        return "a mapping"
    words = {int: "an integer", float: "a number", str: "a string", bool: "true or false", type(None): "null"}
    return words.get(annotation, getattr(annotation, "__name__", str(annotation)))


def check_type(value: Any, annotation: Any) -> tuple[Any, str]:
    """Return (value converted, "") or (value, complaint). An integer is accepted where a number is asked."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    complaint = f"must be {type_name(annotation)}, got {value!r}"
    if annotation is Any:
        return value, ""
    if origin is Annotated:
        value, why = check_type(value, args[0])
        if not why and isinstance(value, (int, float)) and not isinstance(value, bool):
            why = next((w for r in args[1:] if isinstance(r, Range) and (w := r.complaint(value))), "")
        return value, why
    if origin is Literal:
        ok = any(value == a and type(value) is type(a) for a in args)
        return value, "" if ok else complaint + did_you_mean(str(value), [str(a) for a in args])
    if origin in (typing.Union, types.UnionType):
        reasons = []
        for a in args:
            converted, why = check_type(value, a)
            if not why:
                return converted, ""
            reasons.append((a, why))
        # a bound that was missed says more than "must be an integer or null"
        inside = [why for _, why in reasons if why.startswith(("must be at", "must be greater", "must be less"))]
        return value, inside[0] if inside else complaint
    if origin in (list, tuple):
        if not isinstance(value, (list, tuple)):
            return value, complaint
        items = [check_type(v, args[0] if args else Any) for v in value]
        bad = next((f"item {i} {why}" for i, (_, why) in enumerate(items) if why), "")
        return origin(v for v, _ in items), bad
    if origin is dict or annotation is dict:
        if not isinstance(value, Mapping):
            return value, complaint
        checked = {k: check_type(v, args[1] if args else Any) for k, v in value.items()}
        return {k: v for k, (v, _) in checked.items()}, next(
            (f"{k} {why}" for k, (_, why) in checked.items() if why), ""
        )
    if hasattr(annotation, "from_mapping"):  # a section inside a section
        if isinstance(value, annotation) or not isinstance(value, Mapping):
            return value, "" if isinstance(value, annotation) else complaint
        try:
            return annotation.from_mapping(value), ""
        except ConfigError as error:
            return value, "; ".join(f"{p.where.rpartition('.')[2]}: {p.message}" for p in error.problems)
    if annotation is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            return float(value), "" if value == value else complaint
        except OverflowError:
            return value, complaint
    if annotation is int and isinstance(value, bool):
        return value, complaint
    if annotation is type(None):
        return value, "" if value is None else complaint
    return value, "" if isinstance(value, annotation) else complaint
