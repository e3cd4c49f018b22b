"""metrics.jsonl and the picture drawn from it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Self

from zoo.train.files import disk_errors, new_file, write_text

LN2 = math.log(2)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every complete line."""
    records = []
    if path.is_file():
        with disk_errors(path):
            lines = path.read_text(encoding="utf-8").split("\n")
        for line in lines[:-1]:  # what follows the last newline was cut off by a kill
            records.append(json.loads(line))
    return records


class MetricsFile:
    """Appends one JSON line per step. Lines after `last_step` of an earlier run are dropped first."""

    def __init__(self, path: Path, last_step: int = 0):
        self.path = path
        self.records = [r for r in read_metrics(path) if r["step"] <= last_step]
        write_text(path, "".join(json.dumps(r) + "\n" for r in self.records))
        with disk_errors(path):
            self.file: IO[str] = path.open("a", encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *unused: object) -> None:
        with disk_errors(self.path):
            self.file.close()

    def add(self, record: dict[str, Any]) -> None:
        """Append a line, at once."""
        self.records.append(record)
        with disk_errors(self.path):
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()


def draw(
    records: Sequence[Mapping[str, Any]],
    path: Path,
    references: Mapping[str, float],
    bits: bool,
    unit_of_loss: str = "nats per token",
) -> None:
    """Write the loss curve as PNG: in bits per byte beside the reference figures where `bits`, else as it is."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    unit = LN2 if bits else 1.0
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    steps, losses = [r["step"] for r in records], [r["loss"] / unit for r in records]
    axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
    axes.plot(steps, _smooth(losses), color="tab:blue", label="train")
    heldout = [(r["step"], r["heldout_loss"] / unit) for r in records if "heldout_loss" in r]
    if heldout:
        axes.plot(*zip(*heldout, strict=True), "o-", color="tab:orange", markersize=4, label="held-out")
    for (name, value), color in zip(references.items(), ("tab:gray", "tab:green", "tab:red"), strict=False):
        axes.axhline(value, color=color, linestyle="--", linewidth=1, label=f"{name} {value:.2f}")
    axes.set_xlabel("step")
    axes.set_ylabel("bits per byte" if bits else f"loss ({unit_of_loss})")
    axes.grid(alpha=0.3)
    axes.legend()
    with new_file(path) as temporary:
        figure.savefig(temporary)


def _smooth(values: Sequence[float]) -> list[float]:
    """Running mean over about a fiftieth of the run, without the bias of its start."""
    decay = 1 - 1 / max(1.0, len(values) / 50)
    total = weight = 0.0
    out = []
    for v in values:
        total, weight = decay * total + (1 - decay) * v, decay * weight + (1 - decay)
        out.append(total / weight)
    return out
