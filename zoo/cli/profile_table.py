"""`zoo profile` as a table with a few lines below it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zoo.cli import output
from zoo.cli import profile_measured as extra

if TYPE_CHECKING:
    from zoo.cli.profiled import Profiled, Target
    from zoo.graph.spec import Graph
    from zoo.views.folding import Row


def show(graph: Graph, run: Profiled, target: Target, depth: int | None = None) -> None:
    """Print one pass, nodes below `depth` levels in one row."""
    from zoo.views.folding import HEADS, fold, grid

    report, measured = run.report, run.measured
    columns = _columns(run)
    rows = fold(report.nodes, graph.trunk, depth)
    cells = grid(rows, *(column for column, _ in columns.values()))
    if run.prediction or measured:
        outside = {">predicted": run.prediction.rest if run.prediction else None}
        if measured:
            outside |= extra.rest(measured) | {">ms": max(0.0, measured.total - sum(measured.nodes.values()))}
        cells.append(["", "the rest", "", "", *(_ms(outside.get(head)) for head in columns)])
    cells.append(["", "total", "", "", *(total for _, total in columns.values())])
    shape = f"{report.batch_size} x {report.seq_len} tokens"
    after = f" after {report.context_len}" if report.context_len else ""
    work = "forward and backward" if report.mode == "train" else report.mode
    output.table((*HEADS, *columns), cells, f"{graph.name}: {work} of {shape}{after}")
    for line in [*report.assumptions, *_lines(run, target), *extra.lines(run), *run.lines, *_bill(run)]:
        print(line)
    print()


def _columns(run: Profiled) -> dict:
    """Head, and a cell for each row and for all of them."""
    report, prediction, measured = run.report, run.prediction, run.measured
    held = "activation_bytes" if report.mode == "train" else "state_bytes"
    moved = report.bytes_read + report.bytes_written

    def milliseconds(row: Row) -> float:
        return sum(measured.nodes.get(n.path, 0.0) for n in row.sites) if measured else 0.0

    def speed(row: Row) -> str:
        spent = milliseconds(row)
        return output.flops(1e3 * row.total("flops") / spent) if spent and row.total("flops") else ""

    columns = {
        ">params": (lambda r: output.count(r.total("params")), output.count(report.params)),
        ">FLOPs": (lambda r: output.flops(r.total("flops")), output.flops(report.flops)),
        ">useful": (lambda r: output.flops(r.total("useful_flops")), output.flops(report.useful_flops)),
        ">bytes": (lambda r: output.size(r.total("bytes_read") + r.total("bytes_written")), output.size(moved)),
        (">activations" if report.mode == "train" else ">state"): (
            lambda r: output.size(r.total(held)),
            output.size(getattr(report, held)),
        ),
    }
    if prediction:
        columns[">predicted"] = (
            lambda r: _ms(sum(prediction.nodes[n.path] for n in r.sites)),
            _ms(prediction.total),
        )
    if measured:
        for head, whole in extra.phases(measured).items():
            columns[head] = (lambda r, head=head: _ms(extra.phases(measured, r)[head]), _ms(whole))
        columns[">ms"] = (lambda r: _ms(milliseconds(r)), _ms(measured.total))
        if prediction:
            columns[">ratio"] = (lambda r: _ratio(run.ratio(*(n.path for n in r.sites))), _ratio(run.ratio()))
        columns[">time"] = (lambda r: output.percent(milliseconds(r), measured.total) if milliseconds(r) else "", "")
        columns[">FLOP/s"] = (lambda r: speed(r), output.flops(1e3 * report.flops / measured.total))
        columns |= extra.columns(measured)
    elif prediction:
        columns[">time"] = (
            lambda r: output.percent(sum(prediction.nodes[n.path] for n in r.sites), prediction.total),
            "",
        )
    return columns


def _ms(value: float | None) -> str:
    if not value:
        return ""
    return f"{value:.2f}" if value < 1000 else f"{value:.0f}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _lines(run: Profiled, target: Target) -> list[str]:
    report, prediction, measured, limits = run.report, run.prediction, run.measured, run.limits
    tokens, found = report.batch_size * report.seq_len, []
    if prediction:
        peak = report.flops / (1e-3 * prediction.total) / target.device.flops(target.dtype)
        found.append(
            f"predicted for {target.name} in {target.dtype}: {_ms(prediction.total)} ms, "
            f"{1e3 * tokens / prediction.total:,.0f} tokens/s, {100 * peak:.1f}% of the peak"
        )
    if measured:
        found.append(
            f"measured on {measured.device}: median of {measured.repeats} passes, {measured.threads} threads, "
            f"{1e3 * tokens / measured.total:,.0f} tokens/s"
        )
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
