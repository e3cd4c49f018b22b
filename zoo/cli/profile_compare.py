"""`zoo profile A --compare B` as tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zoo.cli import output

if TYPE_CHECKING:
    from zoo.views.compare import Comparison, Difference
    from zoo.views.quantities import Quantity

COLUMNS = ("params", "flops", "activation_bytes", "state_bytes", "predicted", "measured")  # of the nodes


def show(found: Comparison, names: tuple[str, str], title: str) -> None:
    """Print what differs, then what is equal."""
    totals = [
        (q.name, *(said(t.get(q.key, 0), q.unit) for t in found.totals), _ratio(found.ratio(q.key)))
        for q in found.quantities
    ]
    if totals:
        output.table(("", *(f">{name}" for name in names), ">ratio"), totals, f"{names[0]} and {names[1]}: {title}")
        print()
    if found.nodes:
        columns = [q for q in found.quantities if q.key in COLUMNS and any(d.change(q.key) for d in found.nodes)]
        rows = [
            (d.at, d.blocks[0] or "none", d.blocks[1] or "none", str(d.times) if d.times > 1 else "",
             *(_change(d, q) for q in columns))
            for d in found.nodes
        ]  # fmt: skip
        heads = [f">{q.name}" for q in columns]
        order = sorted(heads[:-1], key=lambda head: head == ">parameters")  # what rows are sorted by stays
        output.left_out(output.table(("at", *names, ">x", *heads), rows, "nodes that differ", order))
        print()
    print(found.equal)


def said(number: float, unit: str) -> str:
    """A quantity in its unit."""
    if unit == "ms":
        return f"{number:.3g} ms" if number < 1000 else f"{number:.0f} ms"
    return {"count": output.count, "flops": output.flops, "bytes": output.size}[unit](number)


def _change(found: Difference, quantity: Quantity) -> str:
    first, second = (said(v[quantity.key], quantity.unit) if quantity.key in v else "-" for v in found.values)
    return first if first == second else f"{first} → {second}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
