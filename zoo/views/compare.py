"""Two models beside each other: what differs first, then what is equal."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from zoo.views.folding import spans
from zoo.views.quantities import MEASURED, RATIO, Quantity, Values, gathered

if TYPE_CHECKING:
    from zoo.cost import NodeCost
    from zoo.views.profile import Seen

Pair = tuple[Values, Values]
_Node = tuple[str, "NodeCost", Values]  # place inside its layer
_Layer = tuple[str, list[_Node]]  # its number, or the path of what is no layer


@dataclass
class Difference:
    """Nodes at one place, with their sums: `times` of them with equal costs. A block that is missing is None."""

    place: str
    blocks: tuple[str | None, str | None]
    values: Pair
    layers: list[int] = field(default_factory=list)
    times: int = 0

    @property
    def at(self) -> str:
        """Where, in words; layers are numbered as in the first model that has them."""
        if not self.layers:
            return self.place
        return f"layer{'s' * (len(self.layers) > 1)} {spans(self.layers)}{f': {self.place}' if self.place else ''}"

    def change(self, key: str) -> float:
        """How much more the second one has of a quantity."""
        return self.values[1].get(key, 0) - self.values[0].get(key, 0)


@dataclass(frozen=True)
class Comparison:
    """Totals of both by quantity, those that differ; nodes that differ; what is equal, in a line."""

    quantities: Sequence[Quantity]
    totals: Pair
    nodes: Sequence[Difference]
    equal: str

    def ratio(self, key: str) -> float | None:
        """The second total over the first."""
        first, second = (t.get(key, 0) for t in self.totals)
        return second / first if first else None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        totals = [
            {**vars(q), "values": [t.get(q.key, 0) for t in self.totals], "ratio": self.ratio(q.key)}
            for q in self.quantities
        ]
        changed = [q for q in self.quantities if any(d.change(q.key) for d in self.nodes)]
        columns = [vars(q) for q in sorted(changed, key=lambda q: q.unit != "ms")]  # rows are in the order of time
        keys = [c["key"] for c in columns]
        rows = [
            {
                "at": d.at, "blocks": d.blocks, "times": d.times, "change": {k: d.change(k) for k in keys},
                "values": [{k: v.get(k, 0) for k in keys} for v in d.values],
            }
            for d in self.nodes
        ]  # fmt: skip
        return {"totals": totals, "columns": columns, "rows": rows, "equal": self.equal}


def compare(first: Seen, second: Seen) -> Comparison:
    """Layers are aligned by what they are and are predicted to cost, so that one that was put in moves no other; no
    two measurements agree, so nodes do not differ by these alone."""
    known = {q.key: q for seen in (first, second) for q in seen.quantities if q is not RATIO}
    totals = (first.total, second.total)
    differing = [q for q in known.values() if totals[0].get(q.key, 0) != totals[1].get(q.key, 0)]
    found: dict[Any, Difference] = {}
    same: list[tuple[str, int | None]] = []
    for a, b in _aligned(_layers(first), _layers(second)):
        for one, other in _paired(a[1] if a else [], b[1] if b else []):
            place, name = (one or other)[0], (a or b)[0]  # type: ignore[index]
            layer = int(name) if name.isdigit() else None
            if one and other and _key(one) == _key(other):
                same.append((name, layer))
                continue
            blocks = (one[1].block if one else None, other[1].block if other else None)
            costs = (one[2] if one else {}, other[2] if other else {})
            place = place if layer is not None else name
            key = (place, blocks, *map(_predicted, costs))
            row = found.setdefault(key, Difference(place, blocks, ({}, {})))
            for sums, cost in zip(row.values, costs, strict=True):
                sums |= gathered((sums, cost))
            row.times += 1
            row.layers += [] if layer is None else [layer]
    equal = _equal([q.name for q in known.values() if q not in differing], same, sum(r.times for r in found.values()))
    weight = next((k for k in ("predicted", "flops", "params") if any(d.change(k) for d in found.values())), "params")
    rows = sorted(found.values(), key=lambda d: -abs(d.change(weight)))
    return Comparison(differing, totals, rows, equal)


def _layers(seen: Seen) -> list[_Layer]:
    found: dict[str, list[_Node]] = {}
    for node, cost in zip(seen.report.nodes, seen.costs, strict=True):
        head, _, rest = node.path.partition(".")
        name, _, place = rest.partition(".") if head == "layers" else (node.path, "", "")
        found.setdefault(name, []).append((place, node, cost))
    return list(found.items())


def _key(node: _Node) -> Any:
    place, cost, values = node
    return (place, cost.block, _predicted(values))


def _predicted(values: Values) -> Any:
    measured = {q.key for q in MEASURED}
    return tuple((key, value) for key, value in values.items() if key not in measured)


def _aligned(a: list[_Layer], b: list[_Layer]) -> Iterator[tuple[_Layer | None, _Layer | None]]:
    # what is no layer keeps its name in the key: it is never taken for another
    keys = [[(not name.isdigit() and name, *map(_key, nodes)) for name, nodes in side] for side in (a, b)]
    matcher = difflib.SequenceMatcher(None, *keys, autojunk=False)
    for kind, i, i_end, j, j_end in matcher.get_opcodes():
        mine, theirs = a[i:i_end], b[j:j_end]
        if kind == "equal":
            yield from zip(mine, theirs, strict=True)
            continue
        layers = [[layer for layer in side if layer[0].isdigit()] for side in (mine, theirs)]
        both = min(map(len, layers))
        yield from zip(layers[0][:both], layers[1][:both], strict=True)
        yield from ((layer, None) for layer in layers[0][both:])
        yield from ((None, layer) for layer in layers[1][both:])
        ends = [{name: (name, nodes) for name, nodes in side if not name.isdigit()} for side in (mine, theirs)]
        for name in dict.fromkeys([*ends[0], *ends[1]]):
            yield ends[0].get(name), ends[1].get(name)


def _paired(a: list[_Node], b: list[_Node]) -> Iterator[tuple[_Node | None, _Node | None]]:
    sides = [{node[0]: node for node in side} for side in (a, b)]
    for place in dict.fromkeys([*sides[0], *sides[1]]):
        yield sides[0].get(place), sides[1].get(place)


def _equal(totals: Sequence[str], nodes: Sequence[tuple[str, int | None]], differing: int) -> str:
    parts = [", ".join(totals)] if totals else []
    layers = sorted({layer for _, layer in nodes if layer is not None})
    names = list(dict.fromkeys(name for name, layer in nodes if layer is None))
    names += [f"of layers {spans(layers)}"] if layers else []
    where = f": {', '.join(names)}" if names else ""
    parts.append(f"{len(nodes)} of {len(nodes) + differing} nodes{where}")
    return "equal: " + "; ".join(parts)
