"""`zoo profile CFG`: what a model costs, predicted node by node and measured where it fits."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from zoo.cli import output
from zoo.cli import profile_table as table
from zoo.cli.options import Config, Json, Overrides

if TYPE_CHECKING:
    from zoo.cli.profiled import Profiled, Target
    from zoo.graph.spec import Graph


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
    batch: Annotated[
        int | None, typer.Option("--batch", min=1, help="Rows; with --gpus, of each of them. [1]", show_default=False)
    ] = None,
    mode: Annotated[Literal["train", "prefill", "decode"], typer.Option("--mode", help="What one step is.")] = "train",
    context: Annotated[
        int | None,
        typer.Option("--context", min=0, help="Tokens in the state already. [0; decode: 1024]"),
    ] = None,
    device: Annotated[
        str,
        typer.Option("--device", help="cpu or cuda, which are measured; H100, A100, ... or a YAML file: predicted."),
    ] = "cpu",
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="Of products. [bfloat16; where passes are measured float32]")
    ] = None,
    measure: Annotated[
        bool | None,
        typer.Option("--measure/--no-measure", help="Measure time per node too. [where it takes seconds]"),
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option("--gpus", min=1, help="Devices of a training run, laid out by parallel: or as quickest."),
    ] = None,
    tokens: Annotated[str | None, typer.Option("--tokens", metavar="N", help="Length of the run, as in 10B.")] = None,
    price: Annotated[float | None, typer.Option("--price", min=0.0, help="Of an hour of one device.")] = None,
    depth: Annotated[int | None, typer.Option("--depth", min=1, help="Levels of nodes in the table. [all]")] = None,
    compare: Annotated[
        str | None,
        typer.Option("--compare", metavar="CFG", help="Another model: what differs. key=value changes A only."),
    ] = None,
    html: Annotated[str | None, typer.Option("--html", metavar="FILE", help="Write a page with pictures.")] = None,
    csv: Annotated[str | None, typer.Option("--csv", metavar="FILE", help="Write one row a node.")] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Measure with torch.compile too.")] = False,
    trace: Annotated[
        str | None,
        typer.Option("--trace", metavar="FILE", help="Write a Chrome trace of one pass, with nodes as ranges."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Predict parameters, FLOPs, bytes, state and time of every node, and measure its time.

    With --tokens and --gpus: hours, energy and money of a training run. With --compare: what differs from another
    model, both predicted; with --measure measured too.
    """
    from zoo.cli import profile_views as views
    from zoo.cli import profiled

    bills = gpus is not None or tokens is not None
    _check(bills, mode, price, tokens)
    if compare or html:
        _check_view(
            "--compare" if compare else "--html",
            compare is not None and (bills or compiled or trace is not None),
            seq,
        )
    with output.working("predicting"):
        from zoo.graph.loader import load_graph

        asked = profiled.Asked(profiled.target(device, dtype), mode, batch or 1, profiled.lengths(seq), context)
        target = asked.target
        graph = load_graph(config, overrides or ())
        runs = asked.passes(graph)
        for run in runs if bills else ():
            run.bill = profiled.billed(graph, target, run.report.seq_len, batch, gpus or 1, tokens, price)
    if compare:
        both = ((graph, runs[0]), views.beside(asked, runs[0], compare))
        for one, run in both if measure else ():
            _measure(one, [run], target, True, False, None)
        return views.compared(asked, both, html, csv, as_json)
    _measure(graph, runs, target, measure, compiled, trace)
    views.write(asked, [(graph, run) for run in runs], html, csv)
    if as_json:
        found = [run.as_dict() for run in runs]
        return output.emit({"name": graph.name, "device": target.name, "dtype": target.dtype, "runs": found})
    for run in runs:
        table.show(graph, run, target, depth)
        if target.local and run.not_measured and measure is not False:
            print(f"predicted only: {run.not_measured}", file=sys.stderr)


def _check(bills: bool, mode: str, price: float | None, tokens: str | None) -> None:
    from zoo.errors import ConfigError

    if bills and mode != "train":
        raise ConfigError(f"--mode {mode}: --gpus and --tokens are about training runs")
    if price is not None and tokens is None:
        raise ConfigError("--price: of how many --tokens?")


def _check_view(option: str, more: bool, seq: str | None) -> None:
    from zoo.errors import ConfigError

    if seq and "," in seq:
        raise ConfigError(f"{option} shows one length, --seq {seq} has several")
    if more:
        raise ConfigError(
            f"{option}: two models are compared by one pass, without --gpus, --tokens, --compile and --trace"
        )


def _measure(
    graph: Graph, runs: list[Profiled], target: Target, wanted: bool | None, compiled: bool, trace: str | None
) -> None:
    """Of each run what can be measured, or why it is not."""
    from zoo.errors import ConfigError

    asked = "--compile" if compiled else "--trace" if trace else ""
    if asked and (not target.local or wanted is False):
        raise ConfigError(
            f"{asked} measures: {'not with --no-measure' if target.local else f'{target.name} is not here'}"
        )
    if trace and len(runs) > 1:
        raise ConfigError("--trace: of one length, so --seq takes one number")
    if not target.local or wanted is False:
        for run in runs:
            run.not_measured = "not wanted" if target.local else f"{target.name} is not here"
        return
    from zoo.measure import run as measuring

    extras = measuring.Extras(compiled, measuring.writable(trace) if trace else None)
    for run in runs:
        run.not_measured = measuring.too_large(run.report, target.name, bool(wanted or asked))
        if graph.vision and run.report.seq_len != graph.vision.num_tokens:
            run.not_measured = f"an image has {graph.vision.num_tokens} tokens (vision.image_size)"
        if run.not_measured and asked:
            raise ConfigError(f"{asked}: {run.not_measured}")
    if all(run.not_measured for run in runs):
        return
    with output.progress() as bar:
        task = bar.add_task("measuring", total=len(runs))
        reports, reasons = [run.report for run in runs], [run.not_measured for run in runs]
        found = measuring.measure(graph, reports, reasons, target.name, lambda: bar.advance(task), extras)
    for run, measured in zip(runs, found, strict=True):
        run.measured = measured
