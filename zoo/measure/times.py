"""Time per node: intervals between the marks that hooks leave, read after the pass."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from zoo.measure.visits import Paths, Phase

Seconds = dict[str, float]  # by path


class Times:
    """A visitor. On a GPU a mark is an event on its stream: nothing is waited for before the pass is over."""

    def __init__(self, device: str, now: Callable[[], float]):
        self.on_card, self.now = device == "cuda", now
        self.intervals: list[tuple[Paths, Phase, Any, Any]] = []

    def mark(self) -> Any:
        """This moment."""
        if not self.on_card:
            return self.now()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def settle(self) -> None:
        """Wait until what was asked for is done."""
        if self.on_card:
            torch.cuda.synchronize()

    def seconds(self, start: Any, end: Any) -> float:
        """Between two marks; the device must have settled since."""
        return 1e-3 * start.elapsed_time(end) if self.on_card else end - start

    def enter(self, paths: Paths, phase: Phase) -> Any:
        return self.mark()

    def leave(self, paths: Paths, phase: Phase, mark: Any) -> None:
        self.intervals.append((paths, phase, mark, self.mark()))

    def collect(self) -> dict[Phase, Seconds]:
        """What was spent since the last time, by phase and node."""
        spent: dict[Phase, Seconds] = {"forward": defaultdict(float), "backward": defaultdict(float)}
        for paths, phase, start, end in self.intervals:
            for path in paths:  # sites of shared weights bear equal parts
                spent[phase][path] += self.seconds(start, end) / len(paths)
        self.intervals.clear()
        return spent
