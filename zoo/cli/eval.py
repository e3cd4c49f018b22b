"""`zoo eval RUN`: what a trained model can do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from zoo.cli import output
from zoo.cli.options import Json, Overrides
from zoo.errors import ConfigError


def command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or a saved model.")],
    overrides: Overrides = None,
    tasks: Annotated[
        str,
        typer.Option(
            "--tasks",
            metavar="A,B",
            help="heldout, needle, mqar, ..., lm_eval:NAME [what the model was trained on; for text needle too]",
            show_default=False,
        ),
    ] = "",
    lengths: Annotated[
        str,
        typer.Option("--lengths", metavar="N,M", help="Tokens of a row. [1/2, 1, 2, 4 x train.seq_len]"),
    ] = "",
    samples: Annotated[
        int | None,
        typer.Option(
            "--samples",
            min=1,
            help="Rows of each length and depth [128]; documents of lm_eval [all].",
            show_default=False,
        ),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="Where the model runs.")] = "cpu",
    as_json: Json = False,
) -> None:
    """Judge a trained model: held-out text, synthetic tasks, needles in long texts. Writes RUN/evaluation/TASK.json.

    Accuracy on a synthetic task tells something of models that were trained on it, and of no others. lm_eval:NAME is a
    task of lm-evaluation-harness (extra `eval`), with contexts of train.seq_len tokens.
    """
    numbers = _numbers(lengths)
    with output.stdout_kept_for_json(as_json):
        with output.working("loading"):
            from zoo.train.progress import Reporter
            from zoo.train.suite import Trained, evaluate_run

            trained = Trained.load(run, overrides or (), device=device)
        names = [t.strip() for t in tasks.split(",") if t.strip()]
        with Reporter() as report:
            found = evaluate_run(trained, names, lengths=numbers, samples=samples, report=report)
    if as_json:
        return output.emit(found)
    for document in found:
        _print(document)
    print(f"written to {run / 'evaluation'}")


def _numbers(text: str) -> list[int]:
    try:
        numbers = [int(n) for n in text.split(",") if n.strip()]
    except ValueError:
        raise ConfigError(f"--lengths: must be whole numbers with commas between them, got {text}") from None
    if any(n < 1 for n in numbers):
        raise ConfigError(f"--lengths: must be at least 1, got {text}")
    return numbers


def _print(document: dict[str, Any]) -> None:
    task = document["task"]
    if "figures" in document:
        print(f"{task}: {document['source']}" if task == "heldout" else task)
        figures = {k.replace("_", " "): v for k, v in document["figures"].items()}
        output.facts({k: f"{v:.3f}" if isinstance(v, float) else f"{v:,}" for k, v in figures.items()})
    elif any("depth" in row for row in document["rows"]):
        depths = sorted({row["depth"] for row in document["rows"] if "depth" in row})
        cells = {(r["length"], r["depth"]): f"{r['accuracy']:.2f}" for r in document["rows"] if "depth" in r}
        why = {r["length"]: r.get("skipped", "") for r in document["rows"]}
        lines = [(f"{n:,}", *(cells.get((n, d), "") for d in depths), reason) for n, reason in why.items()]
        title = f"{task}: share of {document['samples']} keys found, by length and depth"
        output.table((">tokens", *(f">{d:.0%}" for d in depths), ""), lines, title)
    else:
        lines = [
            (f"{r['length']:,}", "", "", r["skipped"])
            if "skipped" in r
            else (f"{r['length']:,}", f"{r['accuracy']:.3f}", f"{r['loss']:.3f}", "")
            for r in document["rows"]
        ]
        untrained = "" if document["trained_on"] else " (the model was not trained on it)"
        output.table((">tokens", ">accuracy", ">loss", ""), lines, f"{task}{untrained}")
    print()
