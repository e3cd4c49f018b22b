"""What a person sees of a run: a bar on a terminal, a line now and then elsewhere. All of it on stderr."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 10.0


class Reporter:
    """Phases of a run, one after the other: `begin(what, total)`, then `advance(done, text)`."""

    def __init__(self, show: bool = True, console: Console | None = None):
        self.console = console or Console(stderr=True, highlight=False)
        self.show = show
        self.bar: Progress | None = None
        self.task: TaskID | None = None
        self.what, self.total, self.first, self.start, self.said = "", 1, 0, 0.0, 0.0

    def __enter__(self) -> Self:
        if self.show and self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            self.bar = Progress(
                *columns, TextColumn("{task.fields[text]}"), TimeRemainingColumn(), console=self.console
            )
            self.bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar:
            self.bar.stop()

    def begin(self, what: str, total: int = 1, done: int = 0) -> None:
        """A new phase of `total` pieces, `done` of them already there."""
        self.what, self.total, self.first = what, total, done
        self.start = self.said = time.monotonic()
        if self.bar:
            self.task = self.bar.add_task(what, total=total, completed=done, text="")
        elif self.show and total == 1:
            self.console.print(f"{what} ...")

    def advance(self, done: int, text: str = "", total: int | None = None) -> None:
        """`done` pieces of the phase are there, `total` where that became known only now."""
        self.total = total or self.total
        if self.bar and self.task is not None:
            self.bar.update(self.task, completed=done, total=self.total, text=text)
        elif self.show and self.total > 1:
            now = time.monotonic()
            if done == self.total or now - self.said > _SECONDS_BETWEEN_LINES:
                self.said = now
                left = (now - self.start) / max(1, done - self.first) * (self.total - done)
                self.console.print(f"{self.what} {done}/{self.total}  {text}  {clock(left)} left")

    def end(self) -> None:
        """A phase of one piece is done."""
        self.advance(self.total)

    def say(self, text: str) -> None:
        """A line that stays."""
        if self.show:
            self.console.print(text)


def clock(seconds: float) -> str:
    """m:ss or h:mm:ss"""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


def step_text(record: dict[str, Any], heldout: str, unit: str) -> str:
    """The numbers beside the training bar."""
    parts = [f"loss {record['loss']:.3f}{heldout}", f"{record['tokens_per_second']:,.0f} {unit}/s"]
    if "mfu" in record:
        parts.append(f"MFU {100 * record['mfu']:.0f} %")
    return "  ".join([*parts, f"{record['memory'] / 1e9:.1f} GB"])
