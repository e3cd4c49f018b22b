"""Rows for a spreadsheet."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from zoo.cost import NodeCost

if TYPE_CHECKING:
    from zoo.views.profile import Seen

_PASS = ("mode", "batch_size", "seq_len", "context_len")


def nodes_csv(passes: Sequence[Seen]) -> str:
    """One row a node of every pass, with times in milliseconds."""
    fields = [f.name for f in dataclasses.fields(NodeCost)]
    times = ("predicted_ms", "measured_ms")
    rows = []
    for seen in passes:
        start = {"model": seen.graph.name, **{name: getattr(seen.report, name) for name in _PASS}}
        for node in seen.report.nodes:
            found = [(at or {}).get(node.path) for at in (seen.predicted, seen.measured)]
            rows.append({**start, **vars(node), **dict(zip(times, found, strict=True))})
    return rows_csv(["model", *_PASS, *fields, *times], rows)


def rows_csv(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """A table with a head; what is None stays empty."""
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
