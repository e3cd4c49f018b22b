"""What the page of `zoo profile` shows, as plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from zoo.predict.kinds import KINDS
from zoo.views.drawing import draw
from zoo.views.page import page
from zoo.views.quantities import Quantity, Values, shown, totals, values

if TYPE_CHECKING:
    from zoo.cost import CostReport
    from zoo.graph.spec import Graph
    from zoo.plan.limits import Limits
    from zoo.views.compare import Comparison
    from zoo.views.curves import Curve


@dataclass(frozen=True)
class Seen:
    """A pass of a model with all that is known of it: milliseconds of its nodes by path, predicted and measured, and
    of all of it; what fits; what is said below a table of it."""

    graph: Graph
    report: CostReport
    predicted: Mapping[str, float] | None = None
    predicted_total: float | None = None
    measured: Mapping[str, float] | None = None
    measured_total: float | None = None
    limits: Limits | None = None
    lines: Sequence[str] = ()
    curves: Sequence[Curve] = ()

    @property
    def costs(self) -> list[Values]:
        """Of every node of the report, in order."""
        return [values(node, self.predicted, self.measured) for node in self.report.nodes]

    @property
    def total(self) -> Values:
        """Of the pass."""
        return totals(self.report, self.predicted_total, self.measured_total)

    @property
    def quantities(self) -> list[Quantity]:
        """Those that differ from nothing."""
        return shown(self.total)


def profile_page(
    models: Sequence[Seen], title: str, device: str, memory: float, comparison: Comparison | None = None
) -> str:
    """The page of one model, or of two with what tells them apart."""
    known = {q.key: q for model in models for q in model.quantities}
    data = {
        "title": title,
        "device": device,
        "memory": memory,
        "kinds": ["ends", *KINDS],
        "quantities": [vars(q) for q in known.values()],
        "models": [_model(model) for model in models],
        "note": _note(models[0]),
        "differences": comparison and comparison.as_dict(),
    }
    return page("profile", " and ".join(m.graph.name for m in models), data)


def _model(seen: Seen) -> dict[str, Any]:
    tree = draw(seen.report, seen.graph, seen.costs)
    return {
        "name": seen.graph.name,
        "facts": list(_facts(seen)),
        "tree": tree.as_dict(),
        "curves": [curve.as_dict() for curve in seen.curves],
        "lines": [*seen.report.assumptions, *seen.lines],
    }


def _note(seen: Seen) -> str:
    report = seen.report
    tokens = max(report.seq_len, report.context_len)
    return (
        f"Against length: {report.batch_size} row{'s' * (report.batch_size > 1)}. Against batch: rows of {tokens:,} "
        "tokens. Decode: one token a row after so many. A curve ends where its points take long to compute."
    )


def _facts(seen: Seen) -> Any:
    """Name, value, unit, and good or bad."""
    report, limits = seen.report, seen.limits
    tokens = report.batch_size * report.seq_len
    yield "parameters", report.params, "count", ""
    if report.active_params != report.params:
        yield "active a token", report.active_params, "count", ""
    yield "FLOPs", report.flops, "flops", ""
    if report.flops:
        yield "of them useful", f"{100 * report.useful_flops / report.flops:.0f}%", "text", ""
    yield "bytes moved", report.bytes_read + report.bytes_written, "bytes", ""
    held = ("activations", report.activation_bytes) if report.mode == "train" else ("state", report.state_bytes)
    yield *held, "bytes", ""
    for name, spent in (("predicted", seen.predicted_total), ("measured", seen.measured_total)):
        if spent:
            yield f"{name} time", spent, "ms", ""
            yield f"tokens/s {name}", 1e3 * tokens / spent, "count", ""
    if limits:
        yield "memory", limits.need, "bytes", "good" if limits.fits else "bad"
        yield "of", limits.memory, "bytes", ""
        for name, most in (("largest batch", limits.batch), ("longest row", limits.context)):
            yield name, "any" if most is None else f"{most:,}", "text", "" if most != 0 else "bad"
