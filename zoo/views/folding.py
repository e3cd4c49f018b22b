"""Equal layers of a model, gathered into one entry of a table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zoo.cost import NodeCost
    from zoo.graph.spec import Spec


MOST_NAMES = 3  # of the blocks that a row stands for


@dataclass(frozen=True)
class Row:
    """A block that stands at the same place of `times` equal layers, or all blocks below that place. `sites` are its
    nodes."""

    layers: str  # "0-2, 4-6", only in the first row of its layers
    place: str
    block: str
    sites: tuple[NodeCost, ...]
    times: int = 1

    def total(self, field: str) -> int:
        """Sum of one cost over all sites."""
        return sum(getattr(n, field) for n in self.sites)


def fold(nodes: Iterable[NodeCost], trunk: Sequence[Spec], depth: int | None = None) -> list[Row]:
    """Rows in the order of first appearance. Layers are equal where their specifications are. With `depth` 1 a layer
    is one row, with 2 each of its parts, and so on."""
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
        parts: dict[str, list[int]] = {}
        for i, (place, _) in enumerate(layers[members[0]]):
            parts.setdefault(_above(place, i, depth), []).append(i)
        for n, (place, inside) in enumerate(parts.items()):
            sites = tuple(layers[m][i][1] for m in members for i in inside)
            blocks = list(dict.fromkeys(layers[members[0]][i][1].block for i in inside))
            more = f", {len(blocks) - MOST_NAMES} more" if len(blocks) > MOST_NAMES else ""
            place = layers[members[0]][inside[0]][0] if depth is None else place
            rows.append(Row("" if n else first, place, ", ".join(blocks[:MOST_NAMES]) + more, sites, len(members)))
    return rows + [Row("", n.path, n.block, (n,)) for n in outside_after]


def _above(place: str, number: int, depth: int | None) -> str:
    # without a depth every node is a part of its own
    return str(number) if depth is None else ".".join(place.split(".")[: depth - 1])


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
    return [[r.layers, r.place, r.block, str(r.times) if r.times > 1 else "", *(c(r) for c in columns)] for r in rows]


HEADS = ("layers", "place", "node", ">x")
