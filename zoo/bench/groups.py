"""One question, its candidates, and the contest between them."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from zoo.bench.machine import Peaks, free_memory, memory_peak
from zoo.bench.timing import Runner, Timing, race
from zoo.errors import KernelUnavailable

What = Literal["forward", "forward+backward", "step"]
# |a - b| / |a| between two ways to compute the same; low precision moves whole tokens to other experts
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 1e-1, torch.float16: 3e-2}
SHORTER = (16, 8)  # what may grow faster than its input is first run on so much shorter ones
TELLING_SECONDS, TELLING_BYTES = 0.05, 1 << 24  # a shorter run below these says nothing about growth
SHARE_OF_MEMORY = 0.4  # of what is free; the other candidates' inputs and the allocator want some too


@dataclass(frozen=True)
class Settings:
    """How to measure."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    rounds: int = 7
    compiled: bool = False  # peers, and layers of ours, through torch.compile too
    peer: str | None = None  # whose time the ratios compare with; the quickest peer where it is None
    patience: float = 20.0  # seconds a single call may take


@dataclass(frozen=True)
class Candidate:
    """A way to do the work. `runner.run` returns the tensors that must agree with the other candidates'."""

    name: str
    by: Literal["zoo", "peer"]
    runner: Runner | None
    problem: str | None = None  # why it does not take part
    row: bool = False  # a row of the dispatcher, or what it chooses; they come in its order
    alike: bool = True  # computes the same function as the others
    growing: bool = False  # its time or memory may grow faster than the length: first tried on shorter inputs

    @classmethod
    def refused(cls, name: str, by: Literal["zoo", "peer"], problem: str) -> Candidate:
        """One that cannot take part."""
        return cls(name, by, None, problem)


@dataclass(frozen=True)
class Contest:
    """The candidates of a group at one length, with what they have to do."""

    candidates: Sequence[Candidate]
    flops: int = 0
    moved: int = 0  # bytes of inputs, weights and outputs
    best: bool = False  # our figure is that of our quickest row, not of the first


@dataclass(frozen=True)
class Group:
    """A question: which case, what of it, at which length. `wanted`: what the ratio is meant to reach."""

    case: str
    what: What
    seq: int
    build: Callable[[int], Contest]
    context: int = 0
    wanted: float | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        length = f"after {self.context}" if self.what == "step" else f"T={self.seq}"
        return f"{self.case} {self.what} {length}"


@dataclass
class Entry:
    """A candidate's result: a timing or the reason why there is none."""

    name: str
    by: str
    row: bool = False
    timing: Timing | None = None
    problem: str | None = None
    error: float | None = None
    wrong: bool = False  # it computes another function


def hold(group: Group, settings: Settings, peaks: Peaks, advance: Callable[[], Any] = lambda: None) -> dict[str, Any]:
    """Compare the candidates of a group, time those that agree, and return plain values."""
    gc.collect()
    contest = group.build(group.seq)
    entries = {c.name: Entry(c.name, c.by, c.row, problem=c.problem) for c in contest.candidates}
    left_out = _too_large(group, contest, settings)
    first: list[Tensor] | None = None
    runners: dict[str, Runner] = {}
    for candidate in contest.candidates:
        entry = entries[candidate.name]
        entry.problem = entry.problem or left_out.get(candidate.name)
        if entry.problem or candidate.runner is None:
            continue
        try:
            outputs = _warmed(candidate.runner, settings.device)
        except Exception as error:  # other people's code can fail in any way; the others go on
            entry.problem = complaint(error)
            continue
        if not candidate.alike:
            runners[candidate.name] = candidate.runner
            continue
        if first is None:
            first = outputs
        entry.error = difference(outputs, first)
        if entry.error <= TOLERANCE[settings.dtype]:
            runners[candidate.name] = candidate.runner
        else:
            entry.wrong = True
            entry.problem = f"not timed: its result is off by {entry.error:.1e} of the values"
    first = None
    for name, timing in race(runners, settings.device, settings.rounds, advance).items():
        entries[name].timing = timing
    bound = peaks.bound_ms(contest.flops, contest.moved, group.what == "step")
    return _document(group, contest, list(entries.values()), bound, settings)


def complaint(error: BaseException) -> str:
    """An exception in one line; of a row that was asked for by name only its reason."""
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if isinstance(error, KernelUnavailable):
        return said.partition("': ")[2].partition(": ")[2] or said
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def difference(outputs: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest |a - b| / |b| over the tensors; infinite where shapes differ."""
    if len(outputs) != len(wanted):
        return math.inf
    worst = 0.0
    for a, b in zip(outputs, wanted):
        if a.shape != b.shape:
            return math.inf
        a, b = a.double(), b.double()
        same = a == b  # also where both are infinite
        off = torch.where(same, 0.0, a - b).norm() / torch.where(b.isfinite(), b, 0.0).norm().clamp(min=1e-30)
        worst = max(worst, off.item() if off.isfinite() else math.inf)
    return worst


def _warmed(runner: Runner, device: str) -> list[Tensor]:
    start = time.perf_counter()
    outputs = _once(runner)
    if device == "cuda":
        torch.cuda.synchronize()
        if time.perf_counter() - start < 5:
            _once(runner)  # autotuners and allocators settle
            torch.cuda.synchronize()
    return outputs


def _once(runner: Runner) -> list[Tensor]:
    if runner.prepare:
        runner.prepare()
    found = runner.run()
    return [x.detach().clone() for x in (found if isinstance(found, (tuple, list)) else [found])]


def _too_large(group: Group, contest: Contest, settings: Settings) -> dict[str, str]:
    """Candidates of which shorter inputs foretell that one call takes too long, or more memory than there is."""
    names = [c.name for c in contest.candidates if c.growing and c.runner]
    if not names or group.seq < 64 * SHORTER[0]:
        return {}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    memory: dict[str, list[float]] = {name: [] for name in names}
    for part in SHORTER:
        for candidate in group.build(group.seq // part).candidates:
            if candidate.name in names and candidate.runner:
                spent, held = _needs(candidate.runner, settings.device)
                seconds[candidate.name].append(spent)
                memory[candidate.name].append(held)
    free = free_memory(settings.device)
    # a token loop of ours over a quadratic op keeps every token's part of it, whatever two short runs seem to say
    loops = {c.name for c in contest.candidates if c.row}
    found: dict[str, str] = {}
    for name in names:
        if len(seconds[name]) == len(SHORTER):
            reason = foretold(seconds[name][0], seconds[name][1], settings.patience)
            before = memory[name][1] / 4 if name in loops else memory[name][0]
            reason = reason or foretold_memory(before, memory[name][1], free)
            if reason:
                found[name] = reason
    return found


def _needs(runner: Runner, device: str) -> tuple[float, float]:
    """Seconds and bytes of one call; zeros where it fails, which is told when it is warmed up."""
    best = math.inf
    try:
        with memory_peak(device) as held:
            _once(runner)
        for _ in range(2):
            start = time.perf_counter()
            _once(runner)
            if device == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - start)
            if best > 1:
                break
    except Exception:
        return 0.0, 0.0
    return best, held["bytes"] or 0.0


def _at_full_length(shorter: float, longer: float, most: float) -> tuple[float, float]:
    """The power of the growth from T/16 to T/8, between 1 and `most`, and what it makes of T."""
    power = min(max(math.log2(longer / max(shorter, 1e-9)), 1.0), most)
    return power, longer * SHORTER[-1] ** power


def foretold(shorter: float, longer: float, patience: float) -> str | None:
    """Why a candidate that took so many seconds at T/16 and T/8 is left out at T, or None."""
    if longer < TELLING_SECONDS:
        return None
    power, seconds = _at_full_length(shorter, longer, 4.0)
    if seconds <= patience:
        return None
    return f"left out: grows as T^{power:.1f}, about {seconds:.0f} s a call (more than --patience {patience:g})"


def foretold_memory(shorter: float, longer: float, free: float) -> str | None:
    """Why a candidate that held so many bytes at T/16 and T/8 is left out at T, or None."""
    if longer < TELLING_BYTES:
        return None
    needed = _at_full_length(shorter, longer, 2.0)[1]
    if needed <= SHARE_OF_MEMORY * free:
        return None
    return f"left out: would need about {needed / 2**30:.0f} GiB, {free / 2**30:.0f} GiB are free"


def _median(entry: Entry) -> float:
    return entry.timing.median if entry.timing else math.inf


def _against(entries: Sequence[Entry], peer: str | None) -> Entry | None:
    """Whom the ratios compare with: the named one, else the quickest peer, else the plain torch form."""
    timed = [e for e in entries if e.timing]
    if peer:
        return next((e for e in timed if e.name == peer), None)
    peers = [e for e in timed if e.by == "peer"]
    if peers:
        return min(peers, key=_median)
    return next((e for name in ("chunked", "reference") for e in timed if e.name == name), None)


def _document(
    group: Group, contest: Contest, entries: Sequence[Entry], bound: float, settings: Settings
) -> dict[str, Any]:
    against = _against(entries, settings.peer)
    rows: list[dict[str, Any]] = []
    ours = sorted((e for e in entries if e.row and e.timing), key=_median if contest.best else lambda e: 0.0)
    chosen = next(iter(ours), None)  # else the first, which is what `kernel: auto` runs
    reached = None
    if chosen and chosen.timing and against and against.timing:
        reached = against.timing.median / chosen.timing.median
    for entry in entries:
        row: dict[str, Any] = {"name": entry.name, "by": entry.by, "chosen": entry is chosen, "error": entry.error}
        if entry.timing:
            median = entry.timing.median
            row |= {
                "median_ms": median,
                "min_ms": entry.timing.least,
                "spread": entry.timing.spread,
                "rounds": len(entry.timing.samples),
                "gflops": contest.flops / median / 1e6 if contest.flops else None,
                "gb_s": contest.moved / median / 1e6 if contest.moved else None,
                "roofline": bound / median if bound else None,
                "ratio": against.timing.median / median if against and against.timing else None,
            }
        rows.append(row | {"problem": entry.problem, "wrong": entry.wrong})
    return {
        "case": group.case,
        "what": group.what,
        "seq": group.seq,
        "context": group.context,
        **group.facts,
        "flops": contest.flops,
        "bytes": contest.moved,
        "bound_ms": bound or None,
        "peer": against.name if against else None,
        "wanted": group.wanted,
        "reached": reached,
        "rows": rows,
    }


def wrong(groups: Sequence[dict[str, Any]]) -> Iterator[str]:
    """What computed another function, in words."""
    for group in groups:
        for row in group["rows"]:
            if row.get("wrong"):
                yield f"{group['case']} {group['what']}: {row['name']} {row['problem']}"
