"""What `zoo profile` writes: a page, a sheet, and a comparison with another model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from zoo.cli import output

if TYPE_CHECKING:
    from zoo.architectures.model import Model
    from zoo.cli.profiled import Asked, Profiled
    from zoo.contract import Mode
    from zoo.graph.spec import Graph
    from zoo.views.compare import Comparison
    from zoo.views.curves import Curve
    from zoo.views.profile import Seen

Run = tuple["Graph", "Profiled"]


def write(
    asked: Asked, runs: Sequence[Run], html: str | None, csv: str | None, comparison: Comparison | None = None
) -> None:
    """The page and the sheet, where they are wanted."""
    from zoo.views.page import write as write_file
    from zoo.views.profile import profile_page
    from zoo.views.sheet import nodes_csv

    if csv:
        write_file(csv, nodes_csv([seen(*run) for run in runs]))
    if html:
        models = [dataclasses.replace(seen(*run), curves=_curves(asked, *run)) for run in runs]
        device = asked.target.device
        title = title_of(asked, runs[0][1])
        write_file(html, profile_page(models, title, device.name, device.memory, comparison))


def beside(asked: Asked, first: Profiled, other: str) -> Run:
    """The pass of `other` at the length of the first model."""
    from zoo.graph.loader import load_graph

    with output.working("comparing"):
        graph = load_graph(other)
        (run,) = dataclasses.replace(asked, lengths=[first.report.seq_len]).passes(graph)
    return graph, run


def compared(asked: Asked, runs: tuple[Run, Run], html: str | None, csv: str | None, as_json: bool) -> None:
    """What tells the second from the first."""
    from zoo.views.compare import compare

    found = compare(*(seen(*run) for run in runs))
    write(asked, runs, html, csv, found)
    names = (runs[0][0].name, runs[1][0].name)
    if as_json:
        reports = [run.as_dict() for _, run in runs]
        return output.emit({"models": names, "device": asked.target.name, **found.as_dict(), "runs": reports})
    from zoo.cli import profile_compare

    profile_compare.show(found, names, title_of(asked, runs[1][1]))


def title_of(asked: Asked, run: Profiled) -> str:
    """Which pass, in words."""
    report, target = run.report, asked.target
    after = f" after {report.context_len:,}" if report.context_len else ""
    work = "forward and backward" if report.mode == "train" else report.mode
    return f"{work} of {report.batch_size} x {report.seq_len:,} tokens{after}, {target.name} in {target.dtype}"


def seen(graph: Graph, run: Profiled) -> Seen:
    """What is shown of a pass."""
    from zoo.cli.profile_measured import lines
    from zoo.views.profile import Seen

    said = [*run.report.assumptions, *lines(run), *run.lines]
    return Seen(graph, run.report, run.prediction, run.measured, run.limits, said)


def _curves(asked: Asked, graph: Graph, run: Profiled) -> list[Curve]:
    from zoo.cli.profiled import trained, trained_in
    from zoo.views.curves import curves

    def model(mode: Mode) -> Model:
        return asked.model(graph, mode)

    report, target = run.report, asked.target
    train = dataclasses.replace(trained(graph), dtype=trained_in(target))
    with output.working("drawing curves"):
        return curves(model, report.batch_size, max(report.seq_len, report.context_len), target.timing, train)
