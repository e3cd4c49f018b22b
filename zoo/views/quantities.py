"""What a node is drawn, listed and compared by: predicted from the graph, and measured where that was done."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zoo.cost import CostReport, NodeCost
    from zoo.measure.run import Measured
    from zoo.predict.roofline import Prediction


@dataclass(frozen=True)
class Quantity:
    """`unit` is count, flops, bytes, ms or ratio. `together`: what several nodes have of it is the sum, the largest
    (`max`), or follows from other quantities (`ratio`)."""

    key: str
    name: str
    unit: str
    help: str
    together: str = "sum"


OF_NODES = (
    Quantity("params", "parameters", "count", "weights, shared ones at every site that uses them"),
    Quantity("active_params", "active", "count", "parameters that one token touches"),
    Quantity("flops", "FLOPs", "flops", "of matrix products, as they are executed"),
    Quantity("useful_flops", "useful FLOPs", "flops", "of matrix products, only what the result needs"),
    Quantity("vector_flops", "other work", "flops", "of scans, norms and everything else that is no product"),
    Quantity("bytes", "bytes moved", "bytes", "read and written by an ideal kernel"),
    Quantity("activation_bytes", "activations", "bytes", "kept for backward"),
    Quantity("state_bytes", "state", "bytes", "kept for the next token"),
)
PREDICTED = Quantity("predicted", "predicted time", "ms", "on the device that was asked about")
TIME = Quantity("measured", "measured time", "ms", "median of a few passes here")
FORWARD = Quantity("forward", "forward", "ms", "measured, the first half of the pass")
BACKWARD = Quantity("backward", "backward", "ms", "measured, the second half of the pass")
RATIO = Quantity(
    "predicted_over_measured", "predicted/measured", "ratio", "below 1: slower than predicted", together="ratio"
)
PEAK = Quantity("peak_bytes", "peak memory", "bytes", "measured, the most that was in use beyond what was", "max")
MEASURED = (TIME, FORWARD, BACKWARD, RATIO, PEAK)
ALL = (*OF_NODES, PREDICTED, *MEASURED)
Values = dict[str, float]  # by key; what nobody knows is missing


def known(prediction: Prediction | None, measured: Measured | None) -> dict[str, Mapping[str, float]]:
    """What passes tell of their nodes: quantity, then path."""
    found: dict[str, Mapping[str, float]] = {}
    if prediction:
        found[PREDICTED.key] = prediction.nodes
    if measured:
        found[TIME.key] = measured.nodes
        if measured.backward:
            found |= {FORWARD.key: measured.phases["forward"], BACKWARD.key: measured.phases["backward"]}
        if measured.memory:
            found[PEAK.key] = measured.memory.nodes
    return found


def values(node: NodeCost, of_passes: Mapping[str, Mapping[str, float]]) -> Values:
    """All quantities of one node, of passes as `known` has them; times in milliseconds."""
    found = {q.key: getattr(node, q.key) for q in OF_NODES if q.key != "bytes"}
    found["bytes"] = node.bytes_read + node.bytes_written
    found |= {key: at[node.path] for key, at in of_passes.items() if node.path in at}
    return _with_ratio(found)


def totals(report: CostReport, prediction: Prediction | None, measured: Measured | None) -> Values:
    """The same of the whole pass. Shared weights count once, and times hold what lies around the nodes."""
    found = {q.key: getattr(report, q.key) for q in OF_NODES if q.key != "bytes"}
    found["bytes"] = report.bytes_read + report.bytes_written
    if prediction:
        found[PREDICTED.key] = prediction.total
    if measured:
        found[TIME.key] = measured.total
        if measured.backward:
            found |= {FORWARD.key: measured.forward, BACKWARD.key: measured.backward}
        if measured.memory:
            found[PEAK.key] = measured.memory.peak
    return _with_ratio(found)


def gathered(nodes: Iterable[Values]) -> Values:
    """What several nodes have together."""
    found: Values = {}
    for node in nodes:
        for key, value in node.items():
            found[key] = max(found.get(key, 0), value) if key == PEAK.key else found.get(key, 0) + value
    return _with_ratio(found)


def _with_ratio(found: Values) -> Values:
    found.pop(RATIO.key, None)
    if PREDICTED.key in found and found.get(TIME.key):
        found[RATIO.key] = found[PREDICTED.key] / found[TIME.key]
    return found


def shown(total: Values) -> list[Quantity]:
    """Quantities of which there is any, and which tell something: active parameters where they are not all."""
    alike = total["active_params"] == total["params"]
    return [q for q in ALL if total.get(q.key) and not (alike and q.key == "active_params")]


def kernels(measured: Measured | None, *paths: str) -> list[str]:
    """What ran in the nodes at `paths`: `attention flash`, `linear aten and onednn`."""
    found: dict[str, dict[str, None]] = {}
    for path in paths if measured else ():
        for op, backends in measured.kernels.get(path, {}).items():  # type: ignore[union-attr]
            found.setdefault(op, {}).update(dict.fromkeys(backends))
    return [f"{op} {' and '.join(backends)}" for op, backends in found.items()]
