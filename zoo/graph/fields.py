"""What a combinator's `parse` reads its own fields with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from zoo import registry
from zoo.errors import did_you_mean, one_of
from zoo.graph.reading import Path_
from zoo.graph.spec import Spec

if TYPE_CHECKING:
    from zoo.graph.parse import Parser


class Fields:
    """The fields of one combinator; what is not taken is checked against its signature."""

    def __init__(self, parser: Parser, name: str, values: dict, places: Mapping[Any, Path_], path: Path_):
        self.parser, self.name, self.values, self.places, self.path = parser, name, dict(values), places, path
        self.taken: set[str] = set()

    def at(self, key: Any) -> Path_:
        """Where a field stands."""
        return self.places.get(key, (*self.path, key))

    def take(self, key: str, default: Any = None, required: bool = False) -> Any:
        """A field that the combinator parses by itself."""
        self.taken.add(key)
        if required and key not in self.values:
            self.parser.complain(self.path, f"{self.name} needs the field {key}")
        return self.values.get(key, default)

    def body(self, key: str = "of") -> Spec | None:
        """A required field that holds a node."""
        value = self.take(key, required=True)
        return None if key not in self.values else self.parser.sequence(value, self.at(key))

    def router(self, default: str) -> Spec | None:
        """The field `router`: a name or {name: options}."""
        return self.component("router", self.take("router", default))

    def component(self, kind: str, value: Any) -> Spec | None:
        """The value of the field called `kind`: a name of that kind or {name: options}."""
        name, options = value, {}
        if isinstance(value, Mapping) and len(value) == 1:
            name, options = next(iter(value.items()))
        return self.parser.component(name, options, kind, self.at(kind))

    def options(self) -> dict[str, Any]:
        """Everything else, checked. Call last."""
        rest = {k: v for k, v in self.values.items() if k not in self.taken}
        values, complaints = registry.check_options(self.name, rest)
        for key, why in complaints:
            if why.startswith("unknown option"):
                known = [*self.taken, *registry.options(self.name)]
                why = f"unknown field of {self.name}{did_you_mean(key, known) or '; ' + one_of(known)}"
            self.parser.complain(self.at(key) if key in rest else self.path, why)
        return values
