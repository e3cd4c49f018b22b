"""The graph of a model as nested boxes: its nodes with their costs, repeats folded into one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from zoo.predict.kinds import kind_of, plain
from zoo.views.folding import spans
from zoo.views.quantities import Values, gathered

if TYPE_CHECKING:
    from zoo.cost import CostReport
    from zoo.graph.spec import Graph, Spec

_PARTS = ("encoder", "main", "decoder")  # of a hierarchy, in the order of its children


@dataclass
class Box:
    """A node, or what is drawn around several. `shape`: leaf, stack (one below another), branches (the `columns`
    first ones side by side) or loop. `times` equal copies are drawn once, with what they cost together; `path` is the
    first one's. `kernels`: what ran."""

    path: str
    name: str
    note: str = ""
    kind: str = ""
    shape: str = "leaf"
    times: int = 1
    columns: int = 0
    layers: list[int] = field(default_factory=list)
    values: Values = field(default_factory=dict)
    kernels: list[str] = field(default_factory=list)
    children: list[Box] = field(default_factory=list)

    def like(self) -> Any:
        """What equal boxes have in common."""
        return (self.name, self.note, self.kind, self.shape, self.times, tuple(c.like() for c in self.children))

    def merge(self, other: Box) -> None:
        """Add the costs of a box that is like this one."""
        self.values = gathered((self.values, other.values))
        self.kernels = list(dict.fromkeys([*self.kernels, *other.kernels]))
        self.layers += other.layers
        for mine, theirs in zip(self.children, other.children, strict=True):
            mine.merge(theirs)

    def leaves(self) -> Iterator[Box]:
        """Boxes that are nodes, in order."""
        if self.shape == "leaf":
            yield self
        for child in self.children:
            yield from child.leaves()

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        plain_fields = {k: v for k, v in vars(self).items() if k not in ("children", "layers")}
        return plain_fields | {
            "layers": spans(sorted(set(self.layers))),
            "children": [c.as_dict() for c in self.children],
        }


def draw(report: CostReport, graph: Graph, costs: Sequence[Values], ran: Callable[[str], list[str]]) -> Box:
    """The whole model; `costs` are those of the nodes of `report`, in order; `ran`: kernels at a path."""
    top: dict[str, Any] = {}
    for node, cost in zip(report.nodes, costs, strict=True):
        at = top
        for part in node.path.split("."):
            at = at.setdefault(part, {})
        at.setdefault(_HERE, []).append((node, cost, ran(node.path)))
    found: list[Box] = []
    for part, inside in top.items():
        if part == "layers":
            for i, layer in inside.items():
                box = _box(f"layers.{i}", layer, graph.trunk[int(i)], str(i))
                box.layers = [int(i)]
                found.append(box)
        else:
            found.append(_box(part, inside, None, part))
    return Box("", graph.name, shape="stack", children=fold(found))


_HERE = ""  # key of the nodes that stand at a place itself, which may have others below


def _box(path: str, inside: Mapping[str, Any], spec: Spec | None, part: str) -> Box:
    leaves = [_leaf(path, *node) for node in inside.get(_HERE, ())]
    below = [(key, value) for key, value in inside.items() if key != _HERE]
    children = leaves + [_box(f"{path}.{key}", value, _spec(spec, key), key) for key, value in below]
    label = spec.label if spec else ""
    if len(children) == 1 and (spec is None or spec.name in ("sequence", "repeat") or children[0].shape == "leaf"):
        (only,) = children
        if label and not only.note:
            only.note = label
        return only
    name = label or ("" if part.isdigit() else part)
    if spec is not None and spec.kind == "combinator" and spec.name != "sequence":
        steps = spec.options.get("steps")
        name = f"{name} · {spec.name}" if name and name != spec.name else spec.name
        shape = "branches" if spec.name == "parallel" else "loop" if steps else "stack"
        note = f"{steps} steps" if steps else str(spec.options.get("merge", ""))
        columns = sum(key.isdigit() for key, _ in below) if shape == "branches" else 0
        children = children if shape == "branches" else fold(children)
        return Box(path, name, note, shape=shape, columns=columns, children=children)
    return Box(path, name, shape="stack", children=fold(children))


def _leaf(path: str, node: Any, cost: Values, ran: list[str]) -> Box:
    kind = "ends" if path in ("tok_embeddings", "embed", "lm_head", "head") else kind_of(node.block)
    calls = "" if node.calls == 1 else f"{node.calls:.3g} calls"
    return Box(path, plain(node.block), calls, kind=kind, values=cost, kernels=ran)


def _spec(spec: Spec | None, part: str) -> Spec | None:
    """That of a part of a node; None for what is only a part of it, as a router."""
    if spec is None or not spec.children:
        return None
    if part.isdigit():
        places = spec.order or range(len(spec.children))
        at = int(part)
        return spec.children[places[at]] if at < len(places) else None
    if part in _PARTS:
        at = _PARTS.index(part) - (len(_PARTS) - len(spec.children))  # an encoder may be missing
        return spec.children[max(0, at)]
    return spec.children[0] if part.startswith(("body", "step")) else None


def fold(boxes: Sequence[Box]) -> list[Box]:
    """Runs of equal boxes, or of equal groups of them, become one that says how often."""
    likes = [box.like() for box in boxes]
    found, i = [], 0
    while i < len(boxes):
        period, times = _run(likes, i)
        first = list(boxes[i : i + period])
        for k in range(1, times):
            for box, other in zip(first, boxes[i + k * period : i + (k + 1) * period], strict=True):
                box.merge(other)
        if times > 1 and period == 1:
            first[0].times *= times
        if times > 1 and period > 1:
            layers = [n for box in first for n in box.layers]
            # what repeats inside is folded too
            first = [Box(first[0].path, "", shape="stack", times=times, layers=layers, children=fold(first))]
        found += first
        i += period * times
    return found


def _run(likes: Sequence[Any], start: int) -> tuple[int, int]:
    """Length and number of the equal groups from `start` on that cover most; the shortest such."""
    best, covered = (1, 1), 1
    left = len(likes) - start
    for period in range(1, left // 2 + 1):
        group, times = likes[start : start + period], 1
        while likes[start + times * period : start + (times + 1) * period] == group:
            times += 1
        if times > 1 and times * period > covered:
            best, covered = (period, times), times * period
    return best
