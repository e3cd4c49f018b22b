"""What every claim shares: training, progress, and writing figures, table and picture.

A claim is a file of this folder with
- a docstring: a title, then the claim and its paper, what is measured, what would refute it;
- `run(report) -> Result`, which measures (a few steps only where `report.tiny`);
- optionally `judge(rows) -> list[Verdict]`, where the verdicts follow from the rows: `--draw` asks it again;
- `draw(result, figure)`, which draws a result on a matplotlib figure.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.bench import machine
from zoo.train.files import new_file, write_text
from zoo.train.synthetic import IGNORE

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "measured" / "claims"
SHOWS, NOT_HERE, OPPOSITE = "shows", "does not show at this scale", "opposite"
# Okabe and Ito's colours, which colour-blind readers tell apart; every series also has a marker of its own
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")


# ------------------------------------------------------------------------------------------- results
@dataclass(frozen=True)
class Verdict:
    """A sentence of a paper, whether the figures show it (SHOWS, NOT_HERE or OPPOSITE), and the figures that say so."""

    claim: str
    verdict: str
    evidence: str

    def __post_init__(self) -> None:
        if self.verdict not in (SHOWS, NOT_HERE, OPPOSITE):
            raise ValueError(f"a verdict is {SHOWS!r}, {NOT_HERE!r} or {OPPOSITE!r}, got {self.verdict!r}")


@dataclass
class Result:
    """Figures of a claim and what they say. `columns`: (key of a row, heading, format specification) of the table, in
    order; rows may hold more than is in the table, and `series` what only the picture needs. All of it must be JSON."""

    columns: list[tuple[str, str, str]]
    rows: list[dict[str, Any]]
    verdicts: list[Verdict]
    settings: dict[str, Any]  # seeds among them
    series: dict[str, Any] = field(default_factory=dict)


# ------------------------------------------------------------------------------------------ progress
class Bar:
    """One line of progress."""

    def __init__(self, progress: Progress, label: str, total: int):
        self.progress, self.task = progress, progress.add_task(label, total=total, note="")

    def at(self, done: int, note: str | None = None) -> None:
        """`done` of the total are done."""
        self.progress.update(self.task, completed=done, **({} if note is None else {"note": note}))

    def end(self) -> None:
        """Nothing more comes, be the total reached or not."""
        self.progress.stop_task(self.task)
        if not self.progress.console.is_terminal:  # a log shows no bars: a line for each that ended
            task = self.progress.tasks[self.task]
            self.progress.console.print(task.description, f"{task.completed:.0f}", task.fields["note"], highlight=False)


@dataclass
class Report:
    """What `run` is given: whether it is only to see that it runs, and where progress is shown."""

    progress: Progress
    tiny: bool = False

    def bar(self, label: str, total: int) -> Bar:
        """A new line of progress."""
        return Bar(self.progress, label, total)

    def steps(self, number: int) -> int:
        """`number` of steps, or 2 of them in tiny mode."""
        return min(number, 2) if self.tiny else number


@contextlib.contextmanager
def reporting(tiny: bool = False, quiet: bool = False) -> Iterator[Report]:
    """A report whose progress is shown on stderr."""
    columns = (
        TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True, quiet=quiet)) as progress:
        yield Report(progress, tiny)


# ------------------------------------------------------------------------------------------ training
@dataclass(frozen=True)
class Trained:
    """How a training went. stopped: `solved`, `steps` or `seconds`, what ended it."""

    steps: int
    loss: float
    score: float | None
    stopped: str
    cpu_seconds: float


def rate(step: int, steps: int, warmup: int) -> float:
    """The share of the learning rate at a step: a linear warm-up times a cosine from 1 to a tenth."""
    return min(1.0, step / warmup) * (0.55 + 0.45 * math.cos(math.pi * step / steps))


def cross_entropy(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """Mean over the labels that are no IGNORE."""
    return F.cross_entropy(model(inputs).flatten(0, 1), labels.flatten(), ignore_index=IGNORE)


def train(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    bar: Bar,
    *,
    steps: int,
    lr: float,
    warmup: int = 50,
    weight_decay: float = 0.0,
    seconds: float = float("inf"),
    score: Callable[[], float] | None = None,
    solved: float = float("inf"),
    every: int = 50,
    loss_of: Callable[[nn.Module, Tensor, Tensor], Tensor] = cross_entropy,
    after_step: Callable[[int, float], None] | None = None,
) -> Trained:
    """AdamW with linear warm-up, then cosine decay to a tenth. Every `every` steps `score()` is asked, and training
    ends where that is at least `solved`; it also ends after `seconds` of processor time. `after_step(step, loss)` may
    watch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay, betas=(0.9, 0.98))
    start, reached, loss, step, stopped = time.process_time(), None, torch.zeros(()), 0, "steps"
    model.train()
    for step, (inputs, labels) in zip(range(1, steps + 1), batches, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = lr * rate(step, steps, warmup)
        loss = loss_of(model, inputs, labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if after_step is not None:
            after_step(step, loss.item())
        late = time.process_time() - start > seconds
        if step % every == 0 or step == steps or late:
            note = f"loss {loss.item():.3f}"
            if score is not None:
                model.eval()
                reached = score()
                model.train()
                note += f"  score {reached:.3f}"
            bar.at(step, note)
            if reached is not None and reached >= solved:
                stopped = "solved"
                break
            if late:
                stopped = "seconds"
                break
    bar.end()
    model.eval()
    return Trained(step, loss.item(), reached, stopped, round(time.process_time() - start, 1))


# ------------------------------------------------------------------------------- measuring and writing
def names() -> list[str]:
    """Names of all claims."""
    here = Path(__file__).parent
    return sorted(p.stem for p in here.glob("*.py") if not p.stem.startswith("_") and p.stem != "common")


def claim(name: str) -> Any:
    """The module of a claim."""
    return importlib.import_module(f"claims.{name}")


def measure(name: str, folder: Path = RESULTS, *, tiny: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Run a claim and write its three files."""
    module = claim(name)
    clock, cpu = time.perf_counter(), time.process_time()
    with machine.threads(1), reporting(tiny, quiet) as report:
        result = module.run(report)
    record = {
        "claim": name,
        **words(module),
        "tiny": tiny,
        "seconds": round(time.perf_counter() - clock, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "machine": machine.describe("cpu"),
        **dataclasses.asdict(result),
    }
    write_text(folder / f"{name}.json", json.dumps(record, indent=1) + "\n")
    draw(name, folder)
    if not quiet:
        print(markdown(read(name, folder)))
    return record


def words(module: Any) -> dict[str, str]:
    """Title and text of a claim, from its docstring."""
    title, _, about = inspect.cleandoc(module.__doc__).partition("\n")
    return {"title": title, "about": about.strip()}


def redraw(name: str, folder: Path = RESULTS) -> None:
    """Words, verdicts, table and picture once more, from the rows that were measured."""
    module, record = claim(name), read(name, folder)
    record |= words(module)
    if hasattr(module, "judge"):
        record["verdicts"] = [dataclasses.asdict(v) for v in module.judge(record["rows"])]
    write_text(folder / f"{name}.json", json.dumps(record, indent=1) + "\n")
    draw(name, folder)


def read(name: str, folder: Path = RESULTS) -> dict[str, Any]:
    """The record of a claim that was measured."""
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def draw(name: str, folder: Path = RESULTS) -> None:
    """Table and picture of the figures in the record."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image  # comes with matplotlib

    record = read(name, folder)
    write_text(folder / f"{name}.md", markdown(record))
    figure = Figure(figsize=(8, 5), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    claim(name).draw(result_of(record), figure)
    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").quantize(64)  # a third of the bytes
    with new_file(folder / f"{name}.png") as temporary:
        picture.save(temporary, optimize=True)


def result_of(record: dict[str, Any]) -> Result:
    """The result that a record holds."""
    fields = {f.name: record[f.name] for f in dataclasses.fields(Result)}
    fields["verdicts"] = [Verdict(**v) for v in fields["verdicts"]]
    fields["columns"] = [tuple(c) for c in fields["columns"]]
    return Result(**fields)


def markdown(record: dict[str, Any]) -> str:
    """The page of a record: verdicts, table, picture, settings."""
    result, name = result_of(record), record["claim"]
    lines = [f"# {record['title']}", "", record["about"], ""]
    lines += table(
        ["claim", "verdict", "figures"], [[v.claim, f"**{v.verdict}**", v.evidence] for v in result.verdicts]
    )
    lines += ["", f"![{record['title']}]({name}.png)", ""]
    lines += table(
        [c[1] for c in result.columns], [[_cell(r.get(k), f) for k, _, f in result.columns] for r in result.rows]
    )
    host = record["machine"]
    lines += [
        "",
        f"`python tools/claims {name}`: {record['cpu_seconds']:.0f} s of processor time, {record['seconds']:.0f} s by "
        f"the clock, one thread of {host['device']}, torch {host['versions']['torch']}.",
        "",
        "Settings: " + ", ".join(f"{k} {json.dumps(v)}" for k, v in result.settings.items()) + ".",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _cell(value: Any, spec: str) -> str:
    return "" if value is None else format(value, spec)


def table(headings: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table."""
    whole = [headings, ["---"] * len(headings), *rows]
    return ["| " + " | ".join(str(c).replace("|", "\\|") for c in row) + " |" for row in whole]


def overview(folder: Path = RESULTS) -> None:
    """Print all claims with the verdicts of the last measurement."""
    console = Console()
    for name in names():
        console.print(f"{name}: {inspect.cleandoc(claim(name).__doc__).splitlines()[0]}", style="bold", highlight=False)
        if not (folder / f"{name}.json").is_file():
            console.print("  not measured yet", highlight=False)
            continue
        for v in result_of(read(name, folder)).verdicts:
            console.print(f"  {v.verdict}: {v.claim} {v.evidence}", markup=False, highlight=False)


# ------------------------------------------------------------------------------------------- drawing
def style(number: int) -> dict[str, Any]:
    """Colour and marker of a series."""
    return {"color": COLORS[number % len(COLORS)], "marker": MARKERS[number % len(MARKERS)]}


def label_points(axes: Any, points: Iterable[tuple[float, float, str]], *, size: float = 7.5) -> None:
    """Write a name beside each point (x, y, name), moved up or down where names would lie over each other."""
    figure = axes.figure
    figure.canvas.draw()
    taken: list[Any] = []
    for x, y, text in sorted(points, key=lambda p: (-p[1], p[0])):
        note = axes.annotate(text, (x, y), (5, 0), textcoords="offset points", va="center", fontsize=size)
        for shift in (0, 9, -9, 18, -18, 27, -27, 36, -36, 45, -45, 54, -54):
            note.set_position((5, shift))
            box = note.get_window_extent(figure.canvas.get_renderer())
            if not any(box.overlaps(other) for other in taken):
                break
        taken.append(note.get_window_extent(figure.canvas.get_renderer()))
