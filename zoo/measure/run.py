"""Measures passes: time by medians over several, then memory, and on request with torch.compile and as a trace."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from zoo.architectures.causal_lm import CausalLM
from zoo.architectures.storage import build
from zoo.architectures.vision import VisionModel
from zoo.bench.machine import device_name, free_memory, memory_kept
from zoo.errors import ConfigError, ZooError
from zoo.measure.compiled import against_compiled, timed
from zoo.measure.kernels import Kernels, chosen
from zoo.measure.memory import Memory, memory_of
from zoo.measure.passes import Pass, pass_of
from zoo.measure.times import Times
from zoo.measure.visits import Phase, visited

if TYPE_CHECKING:
    from zoo.cost import CostReport
    from zoo.graph.spec import Graph

FEW, REPEATS, MANY = 3, 5, 25  # passes: 5, up to 25 while time is left, 3 where they are slow
SLOW = 5.0
_PATIENCE = 60.0  # seconds for one pass; slower ones are measured on request only
_FLOPS_PER_SECOND = {"cpu": 2e10, "cuda": 1e13}  # a low guess, to tell seconds from hours


@dataclass(frozen=True)
class Measured:
    """Milliseconds of one pass and of each node in it, medians over `repeats` passes; forward and backward add up.
    `kernels`: what ran, by node and op. `compiled`: see `against_compiled`."""

    total: float
    nodes: dict[str, float]
    repeats: int
    threads: int
    device: str
    forward: float = 0.0
    backward: float = 0.0
    phases: dict[str, dict[str, float]] = field(default_factory=dict)  # nodes, in "forward" and "backward"
    kernels: Kernels = field(default_factory=dict)
    memory: Memory | None = None
    compiled: dict[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Extras:
    """What is measured on request."""

    compile: bool = False
    trace: Path | None = None


def too_large(report: CostReport, device: str, wanted: bool) -> str:
    """Why a pass is not measured, or the empty string. ZooError where it was `wanted` and cannot be."""
    weights = 4 * report.params
    need = weights * (2 if report.mode == "train" else 1) + report.activation_bytes + report.state_bytes
    free = free_memory(device)
    if need > 0.8 * free:
        reason = f"a pass needs about {need / 2**30:,.1f} GiB, {free / 2**30:,.1f} GiB are free"
        if wanted:
            raise ZooError(f"cannot be measured here: {reason}")
        return reason
    seconds = report.flops / _FLOPS_PER_SECOND[device]
    return "" if wanted or seconds < _PATIENCE else f"a pass may take {seconds:.0f} s; --measure insists"


def writable(name: str) -> Path:
    """A file to be written, its folder made. ConfigError where that is impossible."""
    path = Path(name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        raise ConfigError(f"cannot write {name}: {error.strerror}") from None
    return path


def measure(
    graph: Graph,
    reports: Sequence[CostReport],
    reasons: Sequence[str],
    device: str,
    advance: Callable[[], Any],
    extras: Extras = Extras(),
) -> list[Measured | None]:
    """Measure every report that has no reason against it; `advance` is called after each."""
    model = build(dict(graph.document), device=device)
    found: list[Measured | None] = []
    for report, reason in zip(reports, reasons, strict=True):
        found.append(None if reason else _whole(model, report, device, extras))
        advance()
    return found


def _whole(model: CausalLM | VisionModel, report: CostReport, device: str, extras: Extras) -> Measured:
    once = pass_of(model, report, device)
    found = _timed(model, once, device, 1.0, time.perf_counter)
    found = replace(found, memory=memory_of(model, once, device))
    if extras.trace:
        from zoo.measure.trace import write_trace

        write_trace(model, once, device, extras.trace)
    if extras.compile:
        found = replace(found, compiled=against_compiled(model, once, device))
    model.zero_grad(set_to_none=True)
    return found


def measure_model(
    model: CausalLM | VisionModel,
    report: CostReport,
    device: str,
    enough: float = 1.0,
    now: Callable[[], float] = time.perf_counter,
) -> Measured:
    """Times and kernels alone, of passes as `report` describes them, for `enough` seconds; `now` tells seconds."""
    found = _timed(model, pass_of(model, report, device), device, enough, now)
    model.zero_grad(set_to_none=True)
    return found


def _timed(model: CausalLM | VisionModel, once: Pass, device: str, enough: float, now: Callable[[], float]) -> Measured:
    clock = Times(device, now)
    totals: list[tuple[float, float]] = []
    nodes: list[dict[Phase, dict[str, float]]] = []
    begun = now()
    with memory_kept():
        with chosen(model) as kernels:
            once()  # warms up
        with visited(model, clock) as end:
            while not _done(len(totals), now() - begun, enough):
                totals.append(timed(once, clock, end))
                nodes.append(clock.collect())
    phases: dict[str, dict[str, float]] = {
        phase: {p: 1e3 * statistics.median(n[phase].get(p, 0.0) for n in nodes) for p in nodes[0][phase]}
        for phase in ("forward", "backward")
    }
    every = {p: sum(phase.get(p, 0.0) for phase in phases.values()) for p in phases["forward"]}
    forward = 1e3 * statistics.median(f for _, f in totals)
    backward = 1e3 * statistics.median(t - f for t, f in totals)
    return Measured(
        forward + backward, every, len(totals), torch.get_num_threads(), device_name(device), forward, backward, phases,
        kernels,
    )  # fmt: skip


def _done(passes: int, seconds: float, enough: float) -> bool:
    return passes >= FEW and (seconds > SLOW * enough or (passes >= REPEATS and seconds > enough) or passes >= MANY)
