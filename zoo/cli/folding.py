"""Equal layers of a model, gathered into one entry of a table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zoo.cost import NodeCost
    from zoo.graph.spec import Spec


@dataclass(frozen=True)
class Row:
    """A block that stands at the same place of several equal layers. `sites` are its nodes, one per layer."""

    layers: str  # "0-2, 4-6", only in the first row of its layers
    place: str
    block: str
    sites: tuple[NodeCost, ...]

    def total(self, field: str) -> int:
        """Sum of one cost over all sites."""
        return sum(getattr(n, field) for n in self.sites)


def fold(nodes: Iterable[NodeCost], trunk: Sequence[Spec]) -> list[Row]:
    """Rows in the order of first appearance. Layers are equal where their specifications are."""
    outside_before: list[NodeCost] = []
    outside_after: list[NodeCost] = []
    layers: dict[int, list[tuple[str, NodeCost]]] = {}
    for node in nodes:
        head, _, rest = node.path.partition(".")
        if head == "layers":
            index, _, place = rest.partition(".")
            layers.setdefault(int(index), []).append((place, node))
        else:
            (outside_after if layers else outside_before).append(node)
    groups: dict[Any, list[int]] = {}
    for index in layers:
        groups.setdefault(_likeness(trunk[index]), []).append(index)
    rows = [Row("", n.path, n.block, (n,)) for n in outside_before]
    for members in groups.values():
        label = trunk[members[0]].label
        first = f"{spans(members)}{f' ({label})' if label else ''}"
        for i, (place, node) in enumerate(layers[members[0]]):
            sites = tuple(layers[m][i][1] for m in members)
            rows.append(Row("" if i else first, place, node.block, sites))
    return rows + [Row("", n.path, n.block, (n,)) for n in outside_after]


def _likeness(spec: Spec | None) -> Any:
    if spec is None:
        return None
    children = tuple(_likeness(c) for c in spec.children)
    return (
        spec.name,
        str(spec.options),
        children,
        _likeness(spec.norm),
        _likeness(spec.router),
        spec.residual,
        spec.order,
    )


def spans(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> 0-2, 5; four and more even steps are written 0-6 by 2."""
    parts, i = [], 0
    while i < len(numbers):
        step = numbers[i + 1] - numbers[i] if i + 1 < len(numbers) else 0
        j = i
        while j + 1 < len(numbers) and numbers[j + 1] - numbers[j] == step:
            j += 1
        if j - i >= 3 or (j > i and step == 1):
            parts.append(f"{numbers[i]}-{numbers[j]}" + (f" by {step}" if step > 1 else ""))
        else:
            j = i
            parts.append(str(numbers[i]))
        i = j + 1
    return ", ".join(parts)


def grid(rows: Iterable[Row], *columns: Callable[[Row], str]) -> list[list[str]]:
    """Cells of a table: layers, place, block, number of sites, then the given columns."""
    return [
        [r.layers, r.place, r.block, str(len(r.sites)) if len(r.sites) > 1 else "", *(c(r) for c in columns)]
        for r in rows
    ]


HEADS = ("layers", "place", "node", ">x")
