"""Raptor: recovered accuracy against the number of blocks.

Claim: the layers of a trained vision transformer fall into few contiguous phases, and a student with one block for each
phase, applied as often as the phase has layers, recovers the teacher's accuracy: 96 % of DINOv2's with two blocks for
twelve layers (Raptor, arXiv:2512.19941).

Measured: a small vision transformer of six layers learns to tell four drawn shapes apart (disc, ring, cross, bar, at
any place, size, angle and colour). For one to four blocks its layers are put into phases as `zoo phases --min-layers 1`
does, and the student of these phases is distilled in Raptor's two stages, with the teacher's patches, norm and head.
Accuracies are those on fresh images.

Refuted if two blocks recover less than nine tenths of the teacher's accuracy, or if more blocks recover no more.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

import zoo
from claims.common import COLORS, NOT_HERE, OPPOSITE, SHOWS, Report, Result, Verdict, style, train
from zoo.graph.loader import load_graph
from zoo.sections import SHAPES, DataSection, DistillSection, TrainSection, VisionSection
from zoo.train import phases
from zoo.train.distill import objective_of
from zoo.train.evaluate import score
from zoo.train.images import REGIONS, read_images
from zoo.train.loader import Row, Rows, batch

DIM, LAYERS, BATCH, SEED = 64, 6, 32, 0
TEACHER_STEPS, TEACHER_LR = 1500, 3e-3
STEPS, LR, BLOCKS = 400, 3e-3, (1, 2, 3, 4)
CLASSES = ("disc", "ring", "cross", "bar")
FRESH, MEASURED = 1024, 256  # images that accuracies and phases are measured on
CONFIG: dict[str, Any] = {
    "name": "teacher",
    "architecture": "vision",
    "dim": DIM,
    "vision": {"image_size": 16, "patch_size": 4, "channels": 1, "pool": "mean", "num_classes": len(REGIONS)},
    "norm": {"layer": {"eps": 1e-6}},
    "define": {
        "layer": [
            {"attention": {"num_heads": 4, "causal": False, "rope": False, "bias": True}},
            {"mlp": {"activation": "gelu", "bias": True}},
        ]
    },
    "trunk": [{"repeat": LAYERS, "of": "layer"}],
    "data": {"source": SHAPES},
}


class Some:
    """Of drawn images those of CLASSES. A row is the first such one among the 64 that are its own."""

    def __init__(self, rows: Rows):
        self.rows, self.labels = rows, {list(REGIONS).index(name) for name in CLASSES}

    def row(self, index: int) -> Row:
        """Row of an index."""
        drawn = (self.rows.row(64 * index + i) for i in range(64))
        return next(row for row in drawn if int(row.labels[0]) in self.labels)


def drawn() -> tuple[Some, Some]:
    """Images to train on, and fresh ones."""
    images = read_images(DataSection(source=SHAPES), VisionSection.from_mapping(CONFIG["vision"]), SEED, 0)
    return Some(images.train), Some(images.fresh)


def batches(rows: Rows) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of images and labels."""
    for first in itertools.count(0, BATCH):
        part = batch(rows, first, BATCH)
        yield part.inputs, part.labels


def run(report: Report) -> Result:
    blocks, fresh_images = (BLOCKS[:1], 32) if report.tiny else (BLOCKS, FRESH)
    rows, fresh = drawn()

    def accuracy(model: nn.Module) -> float:
        return round(score(model, fresh, fresh_images, 64)["accuracy"], 4)

    teacher: Any = zoo.build(CONFIG, seed=SEED)
    steps = report.steps(TEACHER_STEPS)
    done = train(
        teacher, batches(rows), report.bar("teacher", steps), steps=steps, lr=TEACHER_LR, weight_decay=0.05,
        loss_of=lambda model, inputs, labels: F.cross_entropy(model(inputs), labels.flatten()),
    )  # fmt: skip
    best = accuracy(teacher)
    distances = phases.layer_distances(teacher, rows, fresh_images if report.tiny else MEASURED, 64)
    whole = _in_layers(teacher)
    table = [_row("teacher", [[n] for n in range(1, LAYERS + 1)], whole, whole, best, best, steps, done.cpu_seconds)]
    with tempfile.TemporaryDirectory() as folder:
        teacher.save_pretrained(Path(folder))
        for count in blocks:
            groups = phases.find_phases(distances, count=count, least=1)
            student, trained = distil(report, folder, groups, rows)
            reached, inside = accuracy(student), _in_layers(student)
            name = f"{count} block{'s' * (count > 1)}"
            table.append(_row(name, groups, inside, whole, reached, best, trained.steps, trained.cpu_seconds))
    columns = [
        ("model", "model", ""), ("phases", "layers of the phases", ""), ("params", "parameters in the layers", ","),
        ("share", "of the teacher's", ".0%"), ("accuracy", "accuracy", ".1%"), ("recovered", "recovered", ".1%"),
        ("steps", "steps", ","), ("cpu_seconds", "CPU s", ".1f"),
    ]  # fmt: skip
    settings = {
        "seed": SEED, "config": CONFIG, "classes": CLASSES, "batch": BATCH, "teacher's steps": steps,
        "teacher's lr": TEACHER_LR, "students' steps": report.steps(STEPS), "students' lr": LR,
        "fresh images": fresh_images,
    }  # fmt: skip
    for row in table:
        row["images"] = fresh_images
    series = {"distances": distances.round(4).tolist()}
    return Result(columns, table, judge(table), settings, series)


def distil(report: Report, teacher: str, groups: phases.Groups, rows: Rows) -> tuple[Any, Any]:
    """The student of some phases of a saved teacher, and how its training went."""
    steps = report.steps(STEPS)
    document = phases.student(load_graph(CONFIG), groups, teacher)
    objective = objective_of(DistillSection(teacher=teacher), TrainSection(steps=steps), document)
    student = objective.build(document, device="cpu")
    objective.prepare(student)
    number = itertools.count(1)
    trained = train(
        student, batches(rows), report.bar(f"{len(groups)} blocks", steps), steps=steps, lr=LR,
        weight_decay=phases.WEIGHT_DECAY,
        loss_of=lambda model, inputs, labels: objective(model, inputs, labels, next(number)).mean(),
    )  # fmt: skip
    return student, trained


def _in_layers(model: Any) -> int:
    return sum(p.numel() for p in model.layers.parameters())


def _row(
    model: str, groups: phases.Groups, params: int, whole: int, accuracy: float, best: float, steps: int, seconds: float
) -> dict[str, Any]:
    return {
        "model": model,
        "blocks": len(groups),
        "groups": groups,
        "phases": ", ".join(phases.phase_names(groups)),
        "params": params,
        "share": round(params / whole, 4),
        "accuracy": accuracy,
        "recovered": round(accuracy / best, 4) if best else 0.0,
        "steps": steps,
        "cpu_seconds": seconds,
    }


def judge(rows: list[dict[str, Any]]) -> list[Verdict]:
    """What the figures say."""
    teacher, *students = rows
    by = {r["blocks"]: r for r in students}
    found = []
    if 2 in by:
        two = by[2]
        found.append(
            Verdict(
                "Two blocks recover most of the teacher's accuracy.",
                SHOWS if two["recovered"] >= 0.9 else NOT_HERE,
                f"{two['accuracy']:.1%} of {teacher['accuracy']:.1%}, that is {two['recovered']:.1%} (96 % in the "
                f"paper, at another scale), on {two['images']:,} images; guessing recovers "
                f"{1 / len(CLASSES) / teacher['accuracy']:.0%}.",
            )
        )
    if len(by) > 1:
        few, many = by[min(by)], by[max(by)]
        # two deviations of the difference of two shares of so many images
        noise = 2 * sum(r["accuracy"] * (1 - r["accuracy"]) / r["images"] for r in (few, many)) ** 0.5
        gain = many["accuracy"] - few["accuracy"]
        found.append(
            Verdict(
                "More blocks recover more.",
                SHOWS if gain > noise else OPPOSITE if gain < -noise else NOT_HERE,
                ", ".join(f"{r['blocks']}: {r['recovered']:.1%}" for r in students)
                + f"; {100 * noise:.1f} points of accuracy may be chance.",
            )
        )
    return found


def draw(result: Result, figure: Any) -> None:
    teacher, *students = result.rows
    figure.set_size_inches(8, 3.6)
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    left.axhline(100, color="black", linestyle="--", linewidth=1, label=f"teacher, {LAYERS} layers")
    left.axhline(
        100 / len(CLASSES) / max(teacher["accuracy"], 1e-9),
        color=COLORS[7],
        linestyle=":",
        linewidth=1,
        label="guessing",
    )
    left.plot([r["blocks"] for r in students], [100 * r["recovered"] for r in students], label="student", **style(0))
    left.set_xticks([r["blocks"] for r in students])
    left.set_xlabel("blocks")
    left.set_ylabel("recovered accuracy, %")
    left.set_ylim(0, 108)
    left.grid(alpha=0.3)
    left.legend(fontsize=8)
    similar = [[1 - d for d in row] for row in result.series["distances"]]
    low, high = 0.5, LAYERS + 0.5
    image = right.imshow(similar, cmap="viridis", extent=(low, high, high, low), interpolation="nearest")
    right.set_title("cosine between the teacher's layers", fontsize=9)
    right.set_xlabel("layer")
    figure.colorbar(image, ax=right)
