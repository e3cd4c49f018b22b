"""`zoo build CFG`: compose a model, show its nodes, and save it where wanted."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zoo.cli import output
from zoo.cli.options import Config, Json, Overrides

if TYPE_CHECKING:
    from zoo.cost import CostReport
    from zoo.graph.spec import Graph


def command(
    config: Config,
    overrides: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Draw the weights and save the model here."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the weights.")] = 0,
    as_json: Json = False,
) -> None:
    """Build a model and print its nodes; nothing of its size is allocated unless --out is given."""
    start = time.perf_counter()
    with output.working("building"):
        from zoo.architectures.storage import assemble, build
        from zoo.cost import estimate
        from zoo.graph.loader import load_graph

        graph = load_graph(config, overrides or ())
        report = estimate(assemble(graph), batch_size=1, seq_len=1, mode="prefill")
        seconds = time.perf_counter() - start
    if out is not None:
        with output.working("drawing and saving weights"):
            build(dict(graph.document), seed=seed).save_pretrained(out)
    if as_json:
        output.emit(_document(graph, report, seconds, out))
    else:
        _print(graph, report, seconds, out)


def _document(graph: Graph, report: CostReport, seconds: float, out: Path | None) -> dict[str, Any]:
    keys = ("path", "block", "params", "active_params")
    return {
        "name": graph.name,
        "architecture": graph.architecture,
        "dim": graph.dim,
        "vocab_size": graph.vocab_size or None,
        "layers": len(graph.trunk),
        "params": report.params,
        "active_params": report.active_params,
        "seconds": round(seconds, 3),
        "saved": str(out) if out else None,
        "nodes": [{k: getattr(n, k) for k in keys} for n in report.nodes],
    }


def _print(graph: Graph, report: CostReport, seconds: float, out: Path | None) -> None:
    from zoo.views.folding import HEADS, fold, grid

    rows = fold(report.nodes, graph.trunk)
    cells = grid(
        rows,
        lambda r: output.count(r.sites[0].params),
        lambda r: output.count(r.sites[0].active_params),
        lambda r: output.percent(r.total("params"), report.params),
    )
    title = f"{graph.name}: dim {graph.dim}, {len(graph.trunk)} layers, {graph.interface}"
    output.table((*HEADS, ">params", ">active", ">share"), cells, title)
    counted = sum(n.params for n in report.nodes)
    if counted > report.params:
        print(
            f"shared weights count at each of their sites: {output.count(counted - report.params)} more than there are"
        )
    total, active = report.params, report.active_params
    print(
        f"\n{total:,} parameters ({output.count(total)}), {active:,} touched by one token ({output.count(active)}); "
        f"{output.size(4 * total)} in float32; built in {seconds:.1f} s"
    )
    if out:
        print(f"saved in {out}")
