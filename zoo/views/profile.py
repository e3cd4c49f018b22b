"""What the page of `zoo profile` shows, as plain values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from zoo.predict.kinds import KINDS
from zoo.views.drawing import draw
from zoo.views.page import page
from zoo.views.quantities import RATIO, Quantity, Values, kernels, known, shown, totals, values

if TYPE_CHECKING:
    from zoo.cost import CostReport
    from zoo.graph.spec import Graph
    from zoo.measure.run import Measured
    from zoo.plan.limits import Limits
    from zoo.predict.roofline import Prediction
    from zoo.views.compare import Comparison
    from zoo.views.curves import Curve

# name, value, unit, good or bad, and what is said below: values with their units
Fact = tuple[str, Any, str, str, list[tuple[Any, str]]]


@dataclass(frozen=True)
class Seen:
    """A pass of a model with all that is known of it: what is predicted and measured, what fits, what is said below a
    table of it."""

    graph: Graph
    report: CostReport
    prediction: Prediction | None = None
    measured: Measured | None = None
    limits: Limits | None = None
    lines: Sequence[str] = ()
    curves: Sequence[Curve] = ()

    @cached_property
    def costs(self) -> list[Values]:
        """Of every node of the report, in order."""
        of_passes = known(self.prediction, self.measured)
        return [values(node, of_passes) for node in self.report.nodes]

    @property
    def total(self) -> Values:
        """Of the pass."""
        return totals(self.report, self.prediction, self.measured)

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
    tree = draw(seen.report, seen.graph, seen.costs, partial(kernels, seen.measured))
    return {
        "name": seen.graph.name,
        "facts": list(_facts(seen)),
        "tree": tree.as_dict(),
        "curves": [curve.as_dict() for curve in seen.curves],
        "lines": seen.lines,
        "at": _at(seen),
    }


def _at(seen: Seen) -> dict[str, Any]:
    """Where the pass stands on its curves, and what it took."""
    report = seen.report
    tokens = max(report.seq_len, report.context_len)
    return {"mode": report.mode, "tokens": tokens, "rows": report.batch_size, "ms": seen.total.get("measured")}


def _note(seen: Seen) -> str:
    report = seen.report
    tokens = max(report.seq_len, report.context_len)
    return (
        f"Against length: {report.batch_size} row{'s' * (report.batch_size > 1)}. Against batch: rows of {tokens:,} "
        "tokens. Decode: one token a row after so many. The upright line is the pass above. A curve ends where its "
        "points take long to compute."
    )


def _facts(seen: Seen) -> Iterator[Fact]:
    report, limits, total = seen.report, seen.limits, seen.total
    tokens = report.batch_size * report.seq_len
    active = [(report.active_params, "count"), ("active a token", "")]
    yield "parameters", report.params, "count", "", active if report.active_params != report.params else []
    share = [(100 * report.useful_flops / report.flops, "percent"), ("useful", "")] if report.flops else []
    yield "FLOPs", report.flops, "flops", "", share
    yield "bytes moved", total["bytes"], "bytes", "", []
    if report.mode == "train":
        yield "activations", report.activation_bytes, "bytes", "", []
    else:
        yield "state", report.state_bytes, "bytes", "", []
    if spent := total.get("predicted"):
        yield "predicted time", spent, "ms", "", [(1e3 * tokens / spent, "count"), ("tokens/s", "")]
    yield from _measured_facts(seen.measured, total, tokens)
    if limits:
        mood = "good" if limits.fits else "bad"
        yield "memory", limits.need, "bytes", mood, [("of", ""), (limits.memory, "bytes")]
        for name, most in (("largest batch", limits.batch), ("longest row", limits.context)):
            unit = "rows" if name == "largest batch" else "tokens"
            yield name, "any" if most is None else f"{most:,}", "", "" if most != 0 else "bad", [(unit, "")]


def _measured_facts(measured: Measured | None, total: Values, tokens: int) -> Iterator[Fact]:
    if measured is None:
        return
    yield "measured time", measured.total, "ms", "", [(1e3 * tokens / measured.total, "count"), ("tokens/s", "")]
    if measured.backward:
        yield "forward", measured.forward, "ms", "", [(measured.backward, "ms"), ("backward", "")]
    if ratio := total.get(RATIO.key):
        yield RATIO.name, ratio, RATIO.unit, "", []
    if memory := measured.memory:
        yield "peak memory", memory.peak, "bytes", "", [("beside", ""), (memory.held, "bytes"), ("held", "")]
    if (compiled := measured.compiled) and compiled["compiled"]:
        yield "compiled", compiled["compiled"], "ms", "", [(compiled["ratio"], "ratio"), ("as quick", "")]
