"""`zoo train CFG`: a run folder from a configuration."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zoo.cli import output
from zoo.cli.options import Config, Json, Overrides

if TYPE_CHECKING:
    from zoo.train.run import RunResult


def command(
    config: Config,
    overrides: Overrides = None,
    steps: Annotated[
        int | None,
        typer.Option("--steps", min=1, help="Steps in all, in place of train.steps."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Run folder. [runs/NAME, or with a number behind it]"),
    ] = None,
    nproc: Annotated[
        int | None,
        typer.Option("--nproc", min=1, help="Processes on this machine, laid out as `parallel` says. [1]"),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint of the run.")] = False,
    as_json: Json = False,
) -> None:
    """Train a model through torchtitan; Ctrl-C keeps a checkpoint to resume from."""
    from zoo.graph.loader import load_config

    document = load_config(config, overrides or ())  # before seconds are spent on loading the trainer
    # torchrun or Slurm started the processes again: go on, from the first step if there is no checkpoint yet
    again = any(int(os.environ.get(name, "0")) for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
    resume = resume or bool(again and out and (out / "config.yaml").is_file())
    if nproc and nproc > 1 and "WORLD_SIZE" not in os.environ:
        from zoo.cli.launch import several

        folder = out or (Path(config) if resume else _free(document))
        raise typer.Exit(several(nproc, sys.argv[1:], document, folder))
    with output.stdout_kept_for_json(as_json):
        from zoo.train.run import train

        folder = out or (Path(config) if resume else _free(document))
        result = train(document, out=folder, resume=resume, steps=steps)
    if int(os.environ.get("RANK", "0")):  # the first process tells of the run
        pass
    elif as_json:
        output.emit(_document(result))
    else:
        _print(result)
    if result.interrupted:
        raise typer.Exit(130)


def _free(document: Any) -> Path:
    from zoo.train.folder import free_folder

    return free_folder(str(document.get("name", "model")))


def _document(result: RunResult) -> dict[str, Any]:
    keys = (
        "step",
        "steps",
        "interrupted",
        "parameters",
        "loss",
        "seconds",
        "tokens_per_second",
        "unit",
        "evaluation",
        "sample",
    )
    return {"out": str(result.out)} | {k: getattr(result, k) for k in keys}


def _print(result: RunResult) -> None:
    if result.interrupted:
        print(f"interrupted after step {result.step} of {result.steps}; go on with")
        print(f"  zoo train {result.out} --resume --steps {result.steps}")
        return
    print(
        f"{result.step} steps of {output.count(result.parameters)} parameters in {result.seconds:.0f} s, "
        f"{result.tokens_per_second:,.0f} {result.unit}/s; last loss {result.loss:.3f}"
    )
    figures = {k.replace("_", " "): v for k, v in (result.evaluation or {}).items()}
    output.facts({k: f"{v:.3f}" if isinstance(v, float) else f"{v:,}" for k, v in figures.items()})
    hint = f"; zoo generate {result.out} --prompt TEXT" if result.unit == "tokens" else ""
    print(f"run folder {result.out}{hint}")
