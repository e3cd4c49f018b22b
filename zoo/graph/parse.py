"""Plain values -> nodes, or every problem at once.

A list is a sequence; a name is a definition or a block; a mapping holds one block or combinator with its
options, and beside it the attributes `norm`, `residual` and `share`. Each combinator parses its own fields.
"""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields as dataclass_fields
from typing import Any

from zoo import registry
from zoo.errors import did_you_mean, one_of
from zoo.graph.fields import Fields
from zoo.graph.reading import Path_, Source
from zoo.graph.spec import Residual, Spec
from zoo.schema import accepts_list, check_type

BLOCK_KINDS = ("mixer", "ffn", "memory")
ATTRIBUTES = ("norm", "residual", "share")
MAX_NODES = 20_000
_WIDTH_WORDS = ("dim", "d_model", "hidden_size", "width", "model_dim", "embed_dim")


class Parser:
    """Reads one document. `complain` collects problems; a part that cannot be read becomes None."""

    def __init__(self, source: Source):
        self.source = source
        self.problems: dict[str, Any] = {}
        self.define: Mapping[str, Any] = {}
        self.default_norm: Spec | None = None
        self.default_residual = Residual()
        self.expanding: list[str] = []
        self.expanded: set[str] = set()
        self.sharing: list[str] = []
        self.shared: dict[str, Spec] = {}
        self.width: int | None = None  # of the stream, None: the model's
        self.shared_width: dict[str, int | None] = {}
        self.copy: tuple[int, int] | None = None
        self.nodes = self.mixers = 0
        self.blocks = frozenset(n for kind in BLOCK_KINDS for n in registry.list_blocks(kind))
        self.combinators = frozenset(registry.list_blocks("combinator"))

    def complain(self, path: Path_, message: str) -> None:
        """Note a problem; the same one met in several copies of a layer is noted once."""
        problem = self.source.problem(path, message)
        self.problems.setdefault(str(problem), problem)

    # ------------------------------------------------------------------------------------- nodes
    def node(self, value: Any, path: Path_) -> Spec | None:
        """A node of the trunk, of any form."""
        self.nodes += 1
        if self.nodes > MAX_NODES:
            if self.nodes == MAX_NODES + 1:
                self.complain(path, f"the model has more than {MAX_NODES:,} nodes")
            return None
        if isinstance(value, str):
            return self.named(value, {}, {}, path)
        if isinstance(value, list):
            return self.sequence(value, path)
        if isinstance(value, Mapping):
            return self.mapping(value, path)
        self.complain(path, f"a node is a name, a list or a mapping, got {value!r}")
        return None

    def sequence(self, items: Any, path: Path_, label: str = "") -> Spec | None:
        """A list of nodes, one after the other."""
        if items == []:
            self.complain(path, "the list is empty; it needs at least one block")
        places = [(v, (*path, i)) for i, v in enumerate(items)] if isinstance(items, list) else [(items, path)]
        children = [self.node(v, where) for v, where in places]
        return Spec("sequence", path, children=tuple(c for c in children if c), label=label)

    def mapping(self, value: Mapping, path: Path_) -> Spec | None:
        attributes = {k: v for k, v in value.items() if k in ATTRIBUTES}
        heads = [k for k in value if k not in ATTRIBUTES]
        if not heads:
            return self.reference(attributes, path)
        known = [k for k in heads if k in self.combinators] or [
            k for k in heads if isinstance(k, str) and (k in self.define or k in self.blocks)
        ]
        if not known:
            candidates = [*self.define, *self.blocks, *self.combinators]
            self.complain((*path, heads[0]), f"unknown block {heads[0]!r}{did_you_mean(heads[0], candidates)}")
            return None
        head = known[0]
        siblings = {k: value[k] for k in heads if k != head}
        if siblings and head not in self.combinators:
            other = next(iter(siblings))
            hint = "one block per item: write a list" if other in self.blocks else f"options go under {head}:"
            self.complain((*path, other), f"unexpected key beside {head}; {hint}")
        if head in self.combinators:
            return self.combinator(head, value[head], siblings, attributes, path)
        return self.named(head, value[head], attributes, (*path, head), path)

    def reference(self, attributes: Mapping, path: Path_) -> Spec | None:
        name = attributes.get("share")
        if set(attributes) != {"share"} or not isinstance(name, str):
            self.complain(path, "this item names no block")
            return None
        if name in self.sharing:
            self.complain((*path, "share"), f"the shared node {name!r} contains itself")
        elif name not in self.shared:
            hint = did_you_mean(name, self.shared)
            self.complain((*path, "share"), f"no node before this one is shared as {name!r}{hint}")
        else:
            self.same_width(name, path)
            return self.shared[name].with_(path=path)
        return None

    def same_width(self, name: str, path: Path_) -> None:
        """Complain where a node is shared between streams of different widths."""
        if self.shared_width.setdefault(name, self.width) != self.width:
            self.complain((*path, "share"), f"{name!r} is shared between streams of different widths")

    def named(
        self, name: str, options: Any, attributes: Mapping, path: Path_, item: Path_ | None = None
    ) -> Spec | None:
        """A definition or a block by its name, at `path`; its attributes stand at `item`."""
        item = path if item is None else item
        if name in self.define:
            if options:
                self.complain(path, f"{name} is a definition and takes no options")
            return self.attributes_of(attributes, item, lambda: self.expand(name, path))
        if name not in self.blocks:
            candidates = [*self.define, *self.blocks, *self.combinators]
            kind = registry.block_card(name).kind if name in registry.list_blocks() else ""
            why = f"{name} is a {kind}, not a block" if kind else f"unknown block {name!r}"
            self.complain(path, why + ("" if kind else did_you_mean(name, candidates)))
            return None
        return self.attributes_of(attributes, item, lambda: self.block(name, options, path))

    def expand(self, name: str, path: Path_) -> Spec | None:
        if name in self.expanding:
            chain = " -> ".join([*self.expanding[self.expanding.index(name) :], name])
            self.complain(("define", name), f"the definition contains itself: {chain}")
            return None
        self.expanding.append(name)
        self.expanded.add(name)
        try:
            return self.sequence(self.define[name], ("define", name), label=name)
        finally:
            self.expanding.pop()

    def block(self, name: str, options: Any, path: Path_) -> Spec:
        card = registry.block_card(name)
        index = self.mixers
        self.mixers += card.kind == "mixer"
        values = self.options(name, {} if options is None else options, path)
        return Spec(
            name, path, card.kind, values, norm=self.default_norm, residual=self.default_residual, layer_index=index
        )

    def combinator(self, name: str, value: Any, siblings: Mapping, attributes: Mapping, path: Path_) -> Spec | None:
        cls = registry.load(name)
        at = (*path, name)
        if isinstance(value, Mapping):
            for key in set(value) & set(siblings):
                self.complain((*path, key), f"{key} stands both inside {name} and beside it")
            fields = Fields(self, name, {**siblings, **value}, {k: (*at, k) for k in value}, path)
        else:
            fields = Fields(self, name, {cls.main_field: value, **siblings}, {cls.main_field: at}, path)
        if cls.uses_norm and "norm" in attributes:
            fields.values["norm"], attributes = (
                attributes["norm"],
                {k: attributes[k] for k in attributes if k != "norm"},
            )
        return self.attributes_of(attributes, path, lambda: cls.parse(fields))

    # -------------------------------------------------------------------------------- attributes
    def attributes_of(self, attributes: Mapping, path: Path_, parse) -> Spec | None:
        """Parse a node under `norm`, `residual` (which hold for all blocks inside it) and `share`."""
        before = self.default_norm, self.default_residual
        name = attributes.get("share")
        if "norm" in attributes:
            self.default_norm = self.norm(attributes["norm"], (*path, "norm"))
        if "residual" in attributes:
            self.default_residual = self.residual(attributes["residual"], (*path, "residual"))
        if name is not None and not isinstance(name, str):
            self.complain((*path, "share"), f"must be a name, got {name!r}")
            name = None
        if name in self.sharing:
            self.complain((*path, "share"), f"the shared node {name!r} contains itself")
            name = None
        if name:
            self.sharing.append(name)
        try:
            spec = parse()
        finally:
            self.default_norm, self.default_residual = before
            if name:
                self.sharing.pop()
        if spec is None or not name:
            return spec
        first = self.shared.setdefault(name, spec.with_(share=name))
        self.same_width(name, path)
        if not _same(first, spec):
            self.complain((*path, "share"), f"the nodes shared as {name!r} differ; write `share: {name}` alone")
        return first.with_(path=spec.path)

    def norm(self, value: Any, path: Path_) -> Spec | None:
        """A norm by name or as {name: options}; none for none."""
        if value in ("none", None):
            return None
        name, options = value, {}
        if isinstance(value, Mapping) and len(value) == 1:
            name, options = next(iter(value.items()))
        return self.component(name, options, "norm", path)

    def component(self, name: Any, options: Any, kind: str, path: Path_) -> Spec | None:
        """A norm or router with checked options."""
        known = registry.list_blocks(kind)
        if not isinstance(name, str) or name not in known:
            self.complain(path, f"unknown {kind} {name!r}{did_you_mean(name, known)}; {one_of(known)}")
            return None
        return Spec(name, path, kind, self.options(name, options or {}, (*path, name)))

    def residual(self, value: Any, path: Path_) -> Residual:
        """A style (`pre`, `post`, `normed`, `sandwich`, `reordered`, `pre_post`, `none`) or a mapping of `Residual`'s
        fields; numbers given as a list follow the depth where the attribute stands inside a repeat."""
        given = {"style": value} if isinstance(value, str) else value
        if not isinstance(given, Mapping):
            self.complain(path, f"must be a style or a mapping, got {value!r}")
            return Residual()
        values = self.section(Residual, {k: self.at_depth(v, float) for k, v in given.items()}, path)
        if values.get("learn", "none") != "none" and values.get("scale") is None:
            values["scale"] = 1.0
        residual = Residual(**values)
        if residual.skip != 1 and residual.style not in ("post", "normed", "pre_post"):
            self.complain((*path, "skip"), f"goes with style: post, normed or pre_post, not {residual.style}")
        return residual

    def section(self, cls: type, given: Any, path: Path_) -> dict[str, Any]:
        """Check a mapping against a dataclass; return the good values."""
        if not isinstance(given, Mapping):
            self.complain(path, f"must be a mapping, got {given!r}")
            return {}
        hints = typing.get_type_hints(cls, include_extras=True)
        known = {f.name: hints[f.name] for f in dataclass_fields(cls)}
        values = {}
        for key, value in given.items():
            if key not in known:
                self.complain((*path, key), f"unknown option{did_you_mean(key, known) or '; ' + one_of(known)}")
                continue
            converted, why = check_type(value, known[key])
            if why:
                self.complain((*path, key), why)
            else:
                values[key] = converted
        return values

    # ----------------------------------------------------------------------------------- options
    def options(self, name: str, given: Any, path: Path_) -> dict[str, Any]:
        """Check the options of a block; numbers given as a list follow the depth inside a repeat."""
        if not isinstance(given, Mapping):
            self.complain(path, f"the options of {name} must be a mapping, got {given!r}")
            return {}
        known = registry.options(name)
        scheduled = {}
        for key, value in given.items():
            if key in registry.CONTEXT_OPTIONS and key in known:
                self.complain((*path, key), f"{key} comes from where the block stands")
            elif key in _WIDTH_WORDS and key not in known:
                self.complain((*path, key), "width comes from the model's dim, not from a block")
            else:
                scheduled[key] = self.at_depth(value, known[key].annotation) if key in known else value
        values, complaints = registry.check_options(name, scheduled)
        for key, why in complaints:
            if isinstance(given.get(key), list) and self.copy is None:
                why += " (a list is a depth schedule only inside repeat)"
            self.complain((*path, key) if key in given else path, why)
        return values

    def at_depth(self, value: Any, annotation: Any) -> Any:
        """The value of a depth schedule at the current copy: item i of n, else linear interpolation."""
        numbers = (
            isinstance(value, list)
            and value
            and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in value)
        )
        if not numbers or self.copy is None or accepts_list(annotation):
            return value
        index, copies = self.copy
        if len(value) == copies:
            return value[index]
        place = index / max(copies - 1, 1) * (len(value) - 1)
        low = min(int(place), len(value) - 2) if len(value) > 1 else 0
        high = min(low + 1, len(value) - 1)
        mixed = value[low] + (value[high] - value[low]) * (place - low)
        return round(mixed) if all(isinstance(v, int) for v in value) else mixed

    @contextmanager
    def copy_of(self, index: int, copies: int) -> Iterator[None]:
        """Inside: depth schedules follow copy `index` of `copies`."""
        before, self.copy = self.copy, (index, copies)
        try:
            yield
        finally:
            self.copy = before


def _same(a: Spec, b: Spec) -> bool:
    return (
        (a.name, dict(a.options), a.order, a.residual) == (b.name, dict(b.options), b.order, b.residual)
        and len(a.children) == len(b.children)
        and all(_same(x, y) for x, y in zip(a.children, b.children, strict=True))
        and all(
            (x is None) == (y is None) and (x is None or y is None or _same(x, y))
            for x, y in ((a.norm, b.norm), (a.router, b.router))
        )
    )
