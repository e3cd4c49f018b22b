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
    compiled: Annotated[bool, typer.Option("--compile", help="Measure with torch.compile too.")] = False,
    trace: Annotated[
        str | None,
        typer.Option("--trace", metavar="FILE", help="Write a Chrome trace of one pass, with nodes as ranges."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Predict parameters, FLOPs, bytes, state and time of every node, and measure its time.

    With --tokens and --gpus: hours, energy and money of a training run.
    """
    from zoo.cli import profiled

    bills = gpus is not None or tokens is not None
    _check(bills, mode, price, tokens)
    with output.working("predicting"):
        import torch

        from zoo.architectures.storage import assemble
        from zoo.cost import estimate
        from zoo.graph.loader import load_graph
        from zoo.sections import TrainSection

        target = profiled.target(device, dtype)
        graph = load_graph(config, overrides or ())
        # weights are trained in float32, whatever the products are in
        halves = target.dtype in ("bfloat16", "float16") and mode != "train"
        model = assemble(graph, dtype=getattr(torch, target.dtype) if halves else torch.float32)
        train = TrainSection.from_mapping(graph.document.get("train"))
        before = (DEFAULT_CONTEXT if mode == "decode" else 0) if context is None else context
        runs = []
        for n in _lengths(seq, mode, graph):
            report = estimate(model, batch_size=batch or 1, seq_len=n, context_len=before, mode=mode)
            runs.append(profiled.predicted(model, report, target, train))
            if bills:
                runs[-1].bill = profiled.billed(graph, target, n, batch, gpus or 1, tokens, price)
    _measure(graph, runs, target, measure, compiled, trace)
    if as_json:
        found = [run.as_dict() for run in runs]
        return output.emit({"name": graph.name, "device": target.name, "dtype": target.dtype, "runs": found})
    for run in runs:
        table.show(graph, run, target)
        if target.local and run.not_measured and measure is not False:
            print(f"predicted only: {run.not_measured}", file=sys.stderr)


def _check(bills: bool, mode: str, price: float | None, tokens: str | None) -> None:
    from zoo.errors import ConfigError

    if bills and mode != "train":
        raise ConfigError(f"--mode {mode}: --gpus and --tokens are about training runs")
    if price is not None and tokens is None:
        raise ConfigError("--price: of how many --tokens?")


def _measure(
    graph: Graph, runs: list[Profiled], target: Target, wanted: bool | None, compiled: bool, trace: str | None
) -> None:
    """Of each run what can be measured, or why it is not."""
    from zoo.errors import ConfigError

    asked = "--compile" if compiled else "--trace" if trace else ""
    if asked and (not target.local or wanted is False):
        raise ConfigError(
            f"{asked} measures: {f'{target.name} is not here' if wanted is not False else '--no-measure'}"
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
