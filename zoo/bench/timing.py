"""Times of several callables, taken in interleaved rounds so that a change of the machine's mood meets all of them."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

SAMPLE_MS = 5.0  # a shorter call is repeated inside one sample
BUDGET_MS = 15_000.0  # a slow candidate takes part in fewer rounds, but in three where these take no minute
LEAST_ROUNDS, MOST_MS = 3, 60_000.0


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call, one number a round."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def least(self) -> float:
        return min(self.samples)

    @property
    def spread(self) -> float:
        """The middle half of the samples over the median; with fewer than four, all of them."""
        ordered = sorted(self.samples)
        low, high = ordered[0], ordered[-1]
        if len(ordered) >= 4:
            low, _, high = statistics.quantiles(ordered, n=4)
        return (high - low) / self.median if self.median else 0.0


@dataclass(frozen=True)
class Runner:
    """`run` does `calls` calls; `prepare`, not timed, comes before every run."""

    run: Callable[[], Any]
    prepare: Callable[[], Any] | None = None
    calls: int = 1


def sample(runner: Runner, device: str, repeats: int = 1) -> float:
    """Milliseconds of one call, the mean of `repeats` runs."""
    if runner.prepare:
        runner.prepare()
    collecting = gc.isenabled()
    gc.disable()
    try:
        if device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            begin.record()
            for _ in range(repeats):
                runner.run()
            end.record()
            end.synchronize()
            spent = begin.elapsed_time(end)
        else:
            start = time.perf_counter()
            for _ in range(repeats):
                runner.run()
            spent = 1e3 * (time.perf_counter() - start)
    finally:
        if collecting:
            gc.enable()
    return spent / (repeats * runner.calls)


def race(
    runners: Mapping[str, Runner], device: str, rounds: int, advance: Callable[[], Any] = lambda: None
) -> dict[str, Timing]:
    """Time every runner in `rounds` rounds, each round beginning with another one. They have been warmed up.

    `advance` is called once a round.
    """
    first = {name: sample(runner, device) for name, runner in runners.items()}
    repeats = {
        name: 1 if runner.prepare else max(1, math.ceil(SAMPLE_MS / max(first[name] * runner.calls, 1e-4)))
        for name, runner in runners.items()
    }
    wanted = {name: rounds_for(first[name] * runner.calls, rounds) for name, runner in runners.items()}
    # a first sample that was a single short call says little
    samples = {name: [first[name]] if repeats[name] == 1 else [] for name in runners}
    names = list(runners)
    for turn in range(rounds):
        for name in rotated(names, turn):
            if len(samples[name]) < wanted[name]:
                samples[name].append(sample(runners[name], device, repeats[name]))
        advance()
    return {name: Timing(tuple(s)) for name, s in samples.items()}


def rounds_for(milliseconds: float, rounds: int) -> int:
    """In how many rounds a run of so many milliseconds takes part."""
    milliseconds = max(milliseconds, 1e-4)
    least = LEAST_ROUNDS if LEAST_ROUNDS * milliseconds < MOST_MS else 1
    return max(1, min(rounds, max(least, int(BUDGET_MS / milliseconds))))


def rotated(names: Sequence[str], turn: int) -> list[str]:
    """The same names, beginning with another one each turn."""
    turn %= max(len(names), 1)
    return [*names[turn:], *names[:turn]]
