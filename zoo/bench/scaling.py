"""`zoo bench scaling`: how time and memory of linear-cost ops grow when the length doubles."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

from zoo.bench.cases import CASES, Case
from zoo.bench.groups import Settings, What, complaint
from zoo.bench.machine import memory_peak
from zoo.bench.ops import runner
from zoo.bench.problems import Draw
from zoo.bench.timing import Runner, Timing, race

LENGTHS = (4096, 8192, 16384, 32768)
MOST = 2.1  # times the time, and times the memory, for twice the length


def linear_cases() -> tuple[Case, ...]:
    """The cases whose cost is said to be linear."""
    return tuple(case for case in CASES if case.linear)


def measure(
    case: Case, what: What, lengths: Sequence[int], settings: Settings, advance: Callable[[], Any] = lambda: None
) -> dict[str, Any]:
    """Time every length in the same rounds. Memory is told by `memory`, after all timing is over."""
    gc.collect()
    document: dict[str, Any] = {"case": case.title, "what": what, "wanted": MOST}
    try:
        runners = {str(n): _runner(case, what, n, settings) for n in lengths}
        for one in runners.values():
            one.run()
        timings = race(runners, settings.device, settings.rounds, advance)
    except Exception as error:
        return document | {"rows": [], "problem": complaint(error)}
    return document | {"rows": rows(timings)}


def rows(timings: dict[str, Timing]) -> list[dict[str, Any]]:
    """Of each length its time, and by how much it exceeds that of the length before, told for a doubling."""
    found: list[dict[str, Any]] = []
    for name, timing in timings.items():
        row = {
            "seq": int(name),
            "median_ms": timing.median,
            "min_ms": timing.least,
            "spread": timing.spread,
            "growth": None,
        }
        if found:
            row["growth"] = for_doubling(found[-1]["seq"], found[-1]["median_ms"], row["seq"], timing.median)
        found.append(row)
    return found


def for_doubling(seq: int, value: float, longer: int, larger: float) -> float | None:
    """By what a value is multiplied when the length doubles, from two lengths."""
    from math import log2

    return 2 ** (log2(larger / value) / log2(longer / seq)) if value > 0 and larger > 0 else None


def memory(case: Case, what: What, document: dict[str, Any], settings: Settings) -> None:
    """Add the peak memory of each length, inputs left out, to a document of `measure`."""
    before: dict[str, Any] | None = None
    for row in document["rows"]:
        one = _runner(case, what, row["seq"], settings)
        with memory_peak(settings.device) as found:
            one.run()
        row["memory"], row["memory_growth"] = found["bytes"], None
        if before and before["memory"] and found["bytes"]:
            row["memory_growth"] = for_doubling(before["seq"], before["memory"], row["seq"], found["bytes"])
        before = row


def _runner(case: Case, what: What, seq: int, settings: Settings) -> Runner:
    problem = case.make(Draw(settings.device, settings.dtype), seq, False)
    return runner(lambda *inputs: problem.call("auto", *inputs), problem.inputs, what)
