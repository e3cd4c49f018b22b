"""`zoo distill TEACHER STUDENT`: teach the blocks in which a changed model differs from the original."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from zoo.cli import output, teaching
from zoo.cli.options import Json


def command(
    teacher: Annotated[
        Path, typer.Argument(metavar="TEACHER", help="The original: a saved model, a run folder, or one of the Hub.")
    ],
    student: Annotated[
        Path, typer.Argument(metavar="STUDENT", help="What `zoo graft`, `zoo store assemble` or this command saved.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Save the taught model here.")],
    steps: Annotated[
        int, typer.Option("--steps", metavar="N", min=1, help="Steps of the blocks alone, and as many together.")
    ] = 100,
    lr: teaching.Lr = None,
    seq: teaching.Seq = None,
    batch: teaching.Batch = None,
    data: teaching.Data = None,
    device: teaching.Device = None,
    as_json: Json = False,
) -> None:
    """Teach a grafted or assembled model what the original computes; the parts that both share stay as they are.

    The blocks to teach are found by comparing both. As with `zoo graft --distill` each first learns alone what the
    original's computed in its place, then all learn what the original said. Ctrl-C saves what was learned; to go on,
    give the saved model as STUDENT.
    """
    teaching.checked(lr)
    teaching.free(out)
    with output.stdout_kept_for_json(as_json):
        with output.working("loading"):
            from zoo.convert.folder import copy_beside
            from zoo.graft import pair

            found = pair(teaching.loaded(teacher), teaching.loaded(student))
        if not as_json:
            print(f"taught: {', '.join(found.blocks)}")
        taught = teaching.teach(found, teacher, steps, lr=lr, seq=seq, batch=batch, data=data, device=device)
        document: dict[str, Any] = {
            "taught": list(found.blocks),
            "loss": {"teacher": taught.original, "before": taught.begun, "after": taught.taught},
            "steps": taught.steps,
            "interrupted": taught.interrupted,
            "copied": copy_beside(student / "model" if (student / "model").is_dir() else student, out),
            "saved": str(out),
        }
        found.model.save_pretrained(out)  # last: what is interrupted has no weights, and is no model
    if as_json:
        output.emit(document)
    else:
        teaching.show(document)
        print(f"saved in {out}")
    if taught.interrupted:
        raise typer.Exit(130)
