"""`zoo phases RUN`: which layers of a trained vision model resemble each other, and its recurrent student."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from zoo.cli import output
from zoo.cli.options import Json

if TYPE_CHECKING:
    import numpy as np

_SHADES = " ░▒▓█"


def command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder of a vision model, or a saved one.")],
    phases: Annotated[
        int | None, typer.Option("--phases", min=1, help="So many. [as many as --eps allows]", show_default=False)
    ] = None,
    method: Annotated[
        Literal["dp", "maxcut"],
        typer.Option("--method", help="dp: contiguous ones by dynamic programming; maxcut: the best cut, again."),
    ] = "dp",
    eps: Annotated[
        float, typer.Option("--eps", min=0.0, max=1.0, help="A further cut must part this share of all distances.")
    ] = 0.1,
    min_layers: Annotated[int, typer.Option("--min-layers", min=1, help="Layers of the smallest phase.")] = 2,
    images: Annotated[int, typer.Option("--images", min=1, help="Training images to measure on.")] = 512,
    source: Annotated[
        str | None, typer.Option("--source", metavar="DATA", help="Images in place of data.source of the run.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Folder to write to. [RUN/phases]")] = None,
    as_json: Json = False,
) -> None:
    """Find the phases of a trained vision model, draw the matrix, write the recurrent student: student.yaml."""
    changed = {"source": source} if source else {}
    with output.working("loading"):
        from zoo.architectures.storage import build, from_pretrained
        from zoo.architectures.vision import VisionModel
        from zoo.errors import DataError
        from zoo.graph.loader import load_graph
        from zoo.sections import DataSection, TrainSection
        from zoo.train import phases as found
        from zoo.train.files import write_text
        from zoo.train.images import ImageRows, read_images

        model = from_pretrained(run)
        if not isinstance(model, VisionModel):
            raise DataError(f"{run} holds no vision model")
        graph = load_graph({**model.config, "data": {**(model.config.get("data") or {}), **changed}})
        data = DataSection.from_mapping(graph.document["data"])
        train = TrainSection.from_mapping(graph.document.get("train"))
        rows = read_images(data, model.options, train.seed, images).train
        images = min(images, len(rows)) if isinstance(rows, ImageRows) else images  # drawn ones never end
        size = min(train.batch_size, images)
    with output.progress() as bar:
        task = bar.add_task("measuring", total=images)
        distances = found.layer_distances(model, rows, images, size, lambda done: bar.update(task, completed=done))
    groups = found.find_phases(distances, method=method, count=phases, eps=eps, least=min_layers)
    folder = out or run / "phases"
    picture, path = folder / "phases.png", folder / "student.yaml"
    student = found.student(graph, groups, str(run)) if found.are_contiguous(groups) else None
    if student is not None:
        write_text(path, found.student_text(student))
    found.draw(distances, groups, picture)
    document = {
        "layers": len(distances),
        "images": images,
        "method": method,
        "phases": groups,
        "share_inside": found.share_inside(distances, groups),
        "distances": [[round(float(d), 6) for d in row] for row in distances],
        "parameters": {"teacher": _in_layers(model), "student": student and _in_layers(build(student, device="meta"))},
        "picture": str(picture),
        "student": str(path) if student else None,
    }
    if as_json:
        output.emit(document)
    else:
        _print(document, distances, found.phase_names(groups))


def _in_layers(model: Any) -> int:
    return sum(p.numel() for p in model.layers.parameters())


def _print(document: dict[str, Any], distances: np.ndarray, names: list[str]) -> None:
    for line in _shaded(distances):
        print(line)
    print(f"{document['layers']} layers in {len(names)} phase{'s' * (len(names) > 1)}: {' | '.join(names)}")
    print(f"{100 * document['share_inside']:.1f}% of the distances stand inside phases")
    if document["student"] is None:
        print(f"picture {document['picture']}; no student, for the phases are not contiguous: --method dp finds such")
        return
    parameters = document["parameters"]
    print(
        f"{output.count(parameters['student'])} parameters in the layers of the student, "
        f"{output.count(parameters['teacher'])} in those of the teacher"
    )
    print(f"picture {document['picture']}; zoo train {document['student']}")


def _shaded(distances: np.ndarray) -> list[str]:
    """The matrix in characters: the darker, the more alike."""
    most = distances.max() or 1.0
    return [
        f"{i:>3} " + "".join(2 * _SHADES[round((len(_SHADES) - 1) * (1 - max(d, 0.0) / most))] for d in row)
        for i, row in enumerate(distances, 1)
    ]
