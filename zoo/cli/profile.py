"""`zoo profile CFG`: what a model costs, predicted node by node and measured where it fits."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from zoo.cli import output
from zoo.cli.options import Config, Json, Overrides

if TYPE_CHECKING:
    from zoo.cli.folding import Row
    from zoo.cli.measure import Measured
    from zoo.cost import CostReport
    from zoo.graph.spec import Graph

DEFAULT_LENGTH, DEFAULT_CONTEXT = 1024, 1024


def command(
    config: Config,
    overrides: Overrides = None,
    seq: Annotated[
        str | None,
        typer.Option(
            "--seq",
            metavar="N,...",
            help="Tokens per row. [train.seq_len or 1024; decode: 1; vision: those of an image]",
        ),
    ] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Rows.")] = 1,
    mode: Annotated[Literal["train", "prefill", "decode"], typer.Option("--mode", help="What one step is.")] = "train",
    context: Annotated[
        int | None,
        typer.Option("--context", min=0, help="Tokens in the state already. [0; decode: 1024]"),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="Where to measure: cpu or cuda.")] = "cpu",
    measure: Annotated[
        bool | None,
        typer.Option("--measure/--no-measure", help="Measure time per node too. [where it takes seconds]"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Predict parameters, FLOPs, bytes and state of every node, and measure its time."""
    from zoo.cli import measure as measuring

    with output.working("predicting"):
        from zoo.architectures.storage import assemble
        from zoo.cost import estimate
        from zoo.graph.loader import load_graph

        measuring.check_device(device)
        graph = load_graph(config, overrides or ())
        model = assemble(graph)
        before = (DEFAULT_CONTEXT if mode == "decode" else 0) if context is None else context
        reports = [
            estimate(model, batch_size=batch, seq_len=n, context_len=before, mode=mode)
            for n in _lengths(seq, mode, graph)
        ]
    reasons = ["not wanted" if measure is False else measuring.too_large(r, device, bool(measure)) for r in reports]
    if graph.vision:
        own = graph.vision.num_tokens
        hint = f"an image has {own} tokens (vision.image_size)"
        reasons = [reason or ("" if r.seq_len == own else hint) for r, reason in zip(reports, reasons, strict=True)]
    found: list[Measured | None] = [None] * len(reports)
    if not all(reasons):
        found = measuring.measure(graph, reports, reasons, device)
    if as_json:
        return output.emit(_document(graph, reports, found, reasons, device))
    for report, measured, reason in zip(reports, found, reasons, strict=True):
        _print(graph, report, measured)
        if reason and measure is not False:
            print(f"predicted only: {reason}", file=sys.stderr)


def _lengths(seq: str | None, mode: str, graph: Graph) -> list[int]:
    from zoo.errors import ConfigError

    if seq is None and graph.vision:
        return [graph.vision.num_tokens]
    if seq is None:
        trained = (graph.document.get("train") or {}).get("seq_len", DEFAULT_LENGTH)
        return [1 if mode == "decode" else trained]
    try:
        return [int(part) for part in seq.split(",")]
    except ValueError:
        raise ConfigError(f"--seq {seq}: write numbers, as in 1024,8192") from None


def _document(
    graph: Graph, reports: list[CostReport], found: list[Measured | None], reasons: list[str], device: str
) -> dict[str, Any]:
    runs = []
    for report, measured, reason in zip(reports, found, reasons, strict=True):
        runs.append(report.as_dict() | {"measured": measured and measured.as_dict(), "not_measured": reason or None})
    return {"name": graph.name, "device": device, "runs": runs}


def _print(graph: Graph, report: CostReport, measured: Measured | None) -> None:
    from zoo.cli.folding import HEADS, fold, grid

    rows = fold(report.nodes, graph.trunk)
    held = "activation_bytes" if report.mode == "train" else "state_bytes"
    moved = report.bytes_read + report.bytes_written

    def milliseconds(row: Row) -> float:
        return sum(measured.nodes.get(n.path, 0.0) for n in row.sites) if measured else 0.0

    columns = {
        ">params": (lambda r: output.count(r.total("params")), output.count(report.params)),
        ">FLOPs": (lambda r: output.flops(r.total("flops")), output.flops(report.flops)),
        ">bytes": (lambda r: output.size(r.total("bytes_read") + r.total("bytes_written")), output.size(moved)),
        (">activations" if report.mode == "train" else ">state"): (
            lambda r: output.size(r.total(held)),
            output.size(getattr(report, held)),
        ),
    }
    if measured:
        columns[">ms"] = (lambda r: f"{milliseconds(r):.2f}" if milliseconds(r) else "", f"{measured.total:.2f}")
        columns[">time"] = (lambda r: output.percent(milliseconds(r), measured.total) if milliseconds(r) else "", "")
        columns[">FLOP/s"] = (
            lambda r: (
                output.flops(1e3 * r.total("flops") / milliseconds(r)) if milliseconds(r) and r.total("flops") else ""
            ),
            output.flops(1e3 * report.flops / measured.total),
        )
    cells = grid(rows, *(column for column, _ in columns.values()))
    if measured:
        rest = max(0.0, measured.total - sum(measured.nodes.values()))
        blank = [""] * (len(columns) - 3)
        cells.append(["", "the rest", "", "", *blank, f"{rest:.2f}", output.percent(rest, measured.total), ""])
    cells.append(["", "total", "", "", *(total for _, total in columns.values())])
    shape = f"{report.batch_size} x {report.seq_len} tokens"
    after = f" after {report.context_len}" if report.context_len else ""
    work = "forward and backward" if report.mode == "train" else report.mode
    output.table((*HEADS, *columns), cells, f"{graph.name}: {work} of {shape}{after}")
    lines = [*report.assumptions]
    if measured:
        speed = 1e3 * report.batch_size * report.seq_len / measured.total
        lines.append(
            f"measured on {measured.device}: median of {measured.repeats} passes, {measured.threads} threads, "
            f"{speed:,.0f} tokens/s"
        )
    for line in lines:
        print(line)
    print()
