"""Rows for a spreadsheet."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from zoo.cost import NodeCost
from zoo.views.quantities import MEASURED, PREDICTED, TIME, Quantity, kernels

if TYPE_CHECKING:
    from zoo.views.profile import Seen

_PASS = ("mode", "batch_size", "seq_len", "context_len")


def nodes_csv(passes: Sequence[Seen]) -> str:
    """One row a node of every pass, with times in milliseconds; those of the pass stand in each of its rows."""
    fields = [f.name for f in dataclasses.fields(NodeCost)]
    of_nodes = {_column(q): q.key for q in (PREDICTED, *MEASURED)}
    rows = []
    for seen in passes:
        compiled = (seen.measured and seen.measured.compiled) or {}
        whole = {f"pass_{key}_ms": seen.total.get(key) for key in (PREDICTED.key, TIME.key)}
        whole["pass_compiled_ms"] = compiled.get("compiled")
        start = {"model": seen.graph.name, **{name: getattr(seen.report, name) for name in _PASS}}
        for node, cost in zip(seen.report.nodes, seen.costs, strict=True):
            found = {column: cost.get(key) for column, key in of_nodes.items()}
            ran = {"kernels": ", ".join(kernels(seen.measured, node.path))}
            rows.append({**start, **vars(node), **found, **ran, **whole})
    return rows_csv(list(dict.fromkeys(["model", *_PASS, *fields, *(c for row in rows for c in row)])), rows)


def _column(quantity: Quantity) -> str:
    return f"{quantity.key}_ms" if quantity.unit == "ms" else quantity.key


def rows_csv(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """A table with a head; what is None stays empty."""
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
