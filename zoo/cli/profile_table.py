"""`zoo profile` as a table with a few lines below it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zoo.cli import output
from zoo.cli import profile_measured as extra

if TYPE_CHECKING:
    from collections.abc import Callable

    from zoo.cli.profiled import Profiled, Target
    from zoo.graph.spec import Graph
    from zoo.views.quantities import Values

TIMES = {"predicted": ">predicted", "forward": ">forward", "backward": ">backward", "measured": ">measured"}
LEAST = (">peak", ">FLOP/s", ">forward", ">backward", ">useful", ">bytes", ">activations", ">state", ">time", ">ratio")


def show(graph: Graph, run: Profiled, target: Target, depth: int | None = None) -> None:
    """Print one pass, nodes below `depth` levels in one row."""
    from zoo.cli.profile_views import seen
    from zoo.views.folding import HEADS, fold, grid
    from zoo.views.quantities import gathered

    found, report = seen(graph, run), run.report
    costs = {node.path: cost for node, cost in zip(report.nodes, found.costs, strict=True)}
    total, nodes = found.total, gathered(found.costs)
    unit, scale = ("ms", 1) if max(total.get(key, 0) for key in TIMES) < 1e5 else ("s", 1e-3)
    columns = _columns(total, "activation_bytes" if report.mode == "train" else "state_bytes", scale)
    rows = fold(report.nodes, graph.trunk, depth)
    cells = grid(
        rows, *(lambda r, cell=cell: cell(gathered(costs[n.path] for n in r.sites)) for cell in columns.values())
    )
    rest = {key: max(0.0, total[key] - nodes.get(key, 0)) for key in TIMES if key in total}
    if rest:
        outside = {TIMES[key]: _number(value * scale) for key, value in rest.items()}
        cells.append(["", "the rest", "", "", *(outside.get(head, "") for head in columns)])
    cells.append(["", "total", "", "", *("" if head == ">time" else cell(total) for head, cell in columns.items())])
    shape = f"{report.batch_size} x {report.seq_len} tokens"
    after = f" after {report.context_len}" if report.context_len else ""
    work = "forward and backward" if report.mode == "train" else report.mode
    times = f"; times in {unit}" if rest else ""
    title = f"{graph.name}: {work} of {shape}{after}{times}"
    gone = output.table((*HEADS, *columns), cells, title, LEAST)
    output.left_out(gone)
    for line in [*report.assumptions, *_lines(run, target), *run.lines, *_bill(run), *extra.kernels(run)]:
        print(line)
    print()


def _columns(total: Values, held: str, scale: float) -> dict[str, Callable[[Values], str]]:
    """A cell by head."""

    def amount(key: str, say: Callable[[float], str]) -> Callable[[Values], str]:
        return lambda v: say(v[key]) if key in v else ""

    def time(key: str) -> Callable[[Values], str]:
        return lambda v: _number(v.get(key, 0) * scale)

    def speed(v: Values) -> str:
        spent = v.get("measured")
        return output.flops(1e3 * v["flops"] / spent) if spent and v["flops"] else ""

    columns = {
        ">params": amount("params", output.count),
        ">FLOPs": amount("flops", output.flops),
        ">useful": amount("useful_flops", output.flops),
        ">bytes": amount("bytes", output.size),
        ">activations" if held == "activation_bytes" else ">state": amount(held, output.size),
        **{head: time(key) for key, head in TIMES.items() if key in total},
    }
    if "predicted_over_measured" in total:
        columns[">ratio"] = amount("predicted_over_measured", lambda v: f"{v:.2f}")
    if spent := next((key for key in ("measured", "predicted") if key in total), None):
        columns[">time"] = lambda v: output.percent(v[spent], total[spent]) if v.get(spent) else ""
    if "measured" in total:
        columns[">FLOP/s"] = speed
    if "peak_bytes" in total:
        columns[">peak"] = amount("peak_bytes", output.size)
    return columns


def _number(value: float) -> str:
    if not value:
        return ""
    return f"{value:.2f}" if value < 1000 else f"{value:.0f}"


def _spent(milliseconds: float) -> str:
    return f"{_number(milliseconds)} ms" if milliseconds < 1e5 else f"{milliseconds / 1e3:,.0f} s"


def _lines(run: Profiled, target: Target) -> list[str]:
    report, prediction, limits = run.report, run.prediction, run.limits
    tokens, found = report.batch_size * report.seq_len, []
    if prediction:
        peak = report.flops / (1e-3 * prediction.total) / target.device.flops(target.dtype)
        found.append(
            f"predicted for {target.name} in {target.dtype}: {_spent(prediction.total)}, "
            f"{1e3 * tokens / prediction.total:,.0f} tokens/s, {100 * peak:.1f}% of the peak"
        )
    found += extra.lines(run)
    need, memory = output.size(limits.need), output.size(limits.memory)
    fits = f"fits: {need} of {memory}" if limits.fits else f"does not fit: {need} are needed, {memory} can be used"
    length = report.seq_len + report.context_len
    rows = "any number of rows" if limits.batch is None else _rows(limits.batch)
    longest = "any length" if limits.context is None else f"{limits.context:,} tokens"
    beside = _rows(report.batch_size)
    found.append(f"{fits}; at the most {rows} of {length:,} tokens, or {beside} of {longest}")
    return found


def _rows(number: int) -> str:
    return f"{number:,} row{'' if number == 1 else 's'}"


def _bill(run: Profiled) -> list[str]:
    bill = run.bill
    if bill is None:
        return []
    made = bill.plan
    spread = made.spread
    found = [
        f"{spread.ranks} {made.device.name}, {spread}: a step takes {1e3 * made.seconds:,.1f} ms "
        f"({1e3 * made.compute:,.1f} computing), {bill.tokens_per_second:,.0f} tokens/s, "
        f"{100 * made.mfu:.0f}% of the peak; {output.size(made.peak)} of {output.size(made.device.memory)} a rank"
        f"{'' if made.fits else ': does not fit'}"
    ]
    money = "" if bill.money is None else f", {bill.money:,.0f} in money"
    found.append(
        f"{output.count(bill.tokens)} tokens in {bill.steps:,} steps: {bill.hours:,.1f} hours, "
        f"{bill.gpu_hours:,.1f} GPU hours, {bill.kilowatt_hours:,.0f} kWh at full power of the boards{money}"
    )
    return found
