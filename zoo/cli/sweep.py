"""`zoo sweep CFG key=a,b,...`: what the models of a grid cost, and which of them no other one beats."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from zoo.cli import output
from zoo.cli.options import Config, Json

if TYPE_CHECKING:
    from zoo.cli.profiled import Asked
    from zoo.views.sweep import Axis, Point, Refused


def command(
    config: Config,
    settings: Annotated[
        list[str], typer.Argument(metavar="KEY=VALUE,...", help="Values of each key; all are combined.")
    ],
    seq: Annotated[int | None, typer.Option("--seq", min=1, help="Tokens per row, as in zoo profile.")] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Rows.")] = 1,
    mode: Annotated[Literal["train", "prefill", "decode"], typer.Option("--mode", help="What one step is.")] = "train",
    context: Annotated[
        int | None, typer.Option("--context", min=0, help="Tokens in the state already. [0; decode: 1024]")
    ] = None,
    device: Annotated[
        str,
        typer.Option("--device", help="H100, A100, ..., a YAML file, or cpu and cuda as zoo calibrate measured them."),
    ] = "H100",
    dtype: Annotated[str | None, typer.Option("--dtype", help="Of products. [bfloat16]")] = None,
    prefer: Annotated[
        Literal["more", "fewer"], typer.Option("--params", help="Which number of parameters is better on the front.")
    ] = "more",
    html: Annotated[str | None, typer.Option("--html", metavar="FILE", help="Write a page with a picture.")] = None,
    csv: Annotated[str | None, typer.Option("--csv", metavar="FILE", help="Write one row a model.")] = None,
    as_json: Json = False,
) -> None:
    """Predict what each model of a grid costs, and mark those that no other one beats in time, memory and parameters.

    A combination that makes no model is listed with its reason. A list as a value is bracketed: key=[1,2],[3].
    """
    from zoo.cli import profiled
    from zoo.errors import ConfigError
    from zoo.graph.loader import find_config
    from zoo.views.page import write
    from zoo.views.sweep import axes, sweep_page, with_front

    find_config(config)  # where it is missing, no combination is to blame
    found = axes(settings)
    asked = profiled.Asked(profiled.target(device, dtype), mode, batch, [seq] if seq else None, context)
    points, refused = _profiled(config, found, asked)
    points = with_front(points, prefer)
    target = asked.target
    title = _title(points, asked)
    if html:
        write(html, sweep_page(config, title, found, points, refused, target.device.memory, prefer))
    if csv:
        write(csv, _csv(points))
    if as_json:
        output.emit({"config": config, "device": target.name, "mode": mode, "points": [p.as_dict() for p in points],
                     "refused": [vars(r) for r in refused]})  # fmt: skip
    else:
        _print(found, points, refused, title, target.notes)
    if not points:
        raise ConfigError(f"none of the {len(refused)} combinations makes a model")


def _profiled(config: str, found: list[Axis], asked: Asked) -> tuple[list[Point], list[Refused]]:
    from zoo.errors import ConfigError
    from zoo.graph.loader import load_graph
    from zoo.views.sweep import Point, Refused, grid

    points, refused, combinations = [], [], grid(found)
    with output.progress() as bar:
        task = bar.add_task("profiling", total=len(combinations))
        for settings in combinations:
            try:
                graph = load_graph(config, [f"{key}={value}" for key, value in settings.items()])
                (run,) = asked.passes(graph)
            except ConfigError as error:
                first = error.problems[0]
                refused.append(Refused(settings, f"{first.where}: {first.message}" if first.where else first.message))
            else:
                r, limits = run.report, run.limits
                time = run.prediction.total if run.prediction else None
                costs = (r.params, r.active_params, r.flops, r.useful_flops, time, limits.need, limits.fits)
                points.append(Point(settings, r.seq_len, *costs))
            bar.advance(task)
    return points, refused


def _title(points: list[Point], asked: Asked) -> str:
    lengths = sorted({p.tokens for p in points})
    rows = f"{asked.rows} x {', '.join(f'{n:,}' for n in lengths) or 0} tokens"
    return f"{len(points)} models, {asked.mode} of {rows}, {asked.target.name} in {asked.target.dtype}"


def _print(found: list[Axis], points: list[Point], refused: list[Refused], title: str, notes: tuple[str, ...]) -> None:
    keys = [key for key, values in found if len(values) > 1]
    heads = (*keys, ">params", ">active", ">FLOPs", ">useful", ">predicted ms", ">memory", "fits", "front")
    rows = [
        (
            *(p.settings[key] for key in keys), output.count(p.params), output.count(p.active_params),
            output.flops(p.flops), output.flops(p.useful_flops), "" if p.time is None else f"{p.time:.4g}",
            output.size(p.memory), "yes" if p.fits else "no", "*" if p.front else "",
        )
        for p in points
    ]  # fmt: skip
    if rows:
        output.table(heads, rows, title)
        print()
    for reason in dict.fromkeys(one.reason for one in refused):
        print(f"refused: {reason}")
        for one in refused:
            if one.reason == reason:
                print(f"  {' '.join(f'{k}={one.settings[k]}' for k in keys)}")
    for note in notes:
        print(note)


def _csv(points: list[Point]) -> str:
    from zoo.views.sheet import rows_csv

    rows = [{**point.settings, **{k: v for k, v in point.as_dict().items() if k != "settings"}} for point in points]
    return rows_csv(list(rows[0]) if rows else [], rows)
