"""What a node is drawn, listed and compared by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zoo.cost import CostReport, NodeCost


@dataclass(frozen=True)
class Quantity:
    """`unit` is count, flops, bytes or ms."""

    key: str
    name: str
    unit: str
    help: str


OF_NODES = (
    Quantity("params", "parameters", "count", "weights, shared ones at every site that uses them"),
    Quantity("active_params", "active parameters", "count", "those that one token touches"),
    Quantity("flops", "FLOPs", "flops", "of matrix products, as they are executed"),
    Quantity("useful_flops", "useful FLOPs", "flops", "of matrix products, only what the result needs"),
    Quantity("vector_flops", "other work", "flops", "of scans, norms and everything else that is no product"),
    Quantity("bytes", "bytes moved", "bytes", "read and written by an ideal kernel"),
    Quantity("activation_bytes", "activations", "bytes", "kept for backward"),
    Quantity("state_bytes", "state", "bytes", "kept for the next token"),
)
PREDICTED = Quantity("predicted", "predicted time", "ms", "of the device that was asked about")
MEASURED = Quantity("measured", "measured time", "ms", "median of a few passes here")
Values = dict[str, float]


def values(node: NodeCost, predicted: Mapping[str, float] | None, measured: Mapping[str, float] | None) -> Values:
    """All quantities of one node; times in milliseconds."""
    found = {q.key: getattr(node, q.key) for q in OF_NODES if q.key != "bytes"}
    found["bytes"] = node.bytes_read + node.bytes_written
    if predicted is not None:
        found[PREDICTED.key] = predicted[node.path]
    if measured is not None:
        found[MEASURED.key] = measured.get(node.path, 0.0)
    return found


def totals(report: CostReport, predicted: float | None, measured: float | None) -> Values:
    """The same of the whole pass. Shared weights count once, and times hold what lies around the nodes."""
    found = {q.key: getattr(report, q.key) for q in OF_NODES if q.key != "bytes"}
    found["bytes"] = report.bytes_read + report.bytes_written
    times = {PREDICTED.key: predicted, MEASURED.key: measured}
    return found | {key: time for key, time in times.items() if time is not None}


def shown(total: Values) -> list[Quantity]:
    """Quantities of which there is any."""
    return [q for q in (*OF_NODES, PREDICTED, MEASURED) if total.get(q.key)]
