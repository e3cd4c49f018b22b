"""Layouts for a number of accelerators: those that the model can take and that fit, the quickest first."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from zoo.devices import USABLE, Device
from zoo.errors import ConfigError
from zoo.parallel.layout import check
from zoo.plan.plan import Plan, plan
from zoo.plan.spread import Spread, resolve
from zoo.plan.subject import Subject
from zoo.predict.roofline import Timing
from zoo.sections import DataSection, ParallelSection
from zoo.train import sequence_chunks

MOST_CONTEXT = 8


@dataclass(frozen=True)
class Proposal:
    """`best` layouts, how many were `tried`, how many of them were refused (by the model or the batch), how many are
    too large for the memory, and why the first is the choice."""

    best: tuple[Plan, ...]
    tried: int
    refused: int
    too_large: int
    reason: str


def propose(subject: Subject, ranks: int, device: Device, timing: Timing, most: int = 5) -> Proposal:
    """The quickest layouts of `ranks` accelerators. ConfigError where there is none."""
    allowed: dict[Any, bool] = {}
    fitting: list[Plan] = []
    tried = refused = 0
    smallest: Plan | None = None
    alone: Plan | None = None  # FSDP and nothing else
    for layout in _layouts(subject, ranks, device.node):
        tried += 1
        try:
            spread = resolve(layout, subject.train, ranks)
            if not _can(subject, layout, allowed):
                raise ConfigError("refused")
        except ConfigError:
            refused += 1
            continue
        made = plan(subject, spread, device, timing)
        if made.fits:
            fitting.append(made)
        if spread.dp_shard == ranks and spread.ep == 1:
            alone = made
        if smallest is None or made.peak < smallest.peak:
            smallest = made
    if smallest is None:
        rows = subject.train.batch_size // subject.train.accumulation
        raise ConfigError(
            f"train.batch_size: no layout of {ranks} ranks divides {rows} rows (batch_size / accumulation); "
            f"{ranks} rows would do"
        )
    if not fitting:
        need, have = smallest.peak / 2**30, USABLE * device.memory / 2**30
        raise ConfigError(
            f"no layout of {ranks} {device.name} fits: the smallest ({smallest.spread}) needs {need:.1f} GiB a rank of "
            f"{have:.1f} that can be used; train.activation_checkpoint: full, train.accumulation, or more GPUs help"
        )
    # of those that are about as quick the simpler one
    fitting.sort(key=lambda p: (round(p.seconds, 6), sum(n > 1 for n in _axes(p.spread))))
    too_large = tried - refused - len(fitting)
    return Proposal(tuple(fitting[:most]), tried, refused, too_large, _reason(fitting[0], alone, ranks))


def _axes(spread: Spread) -> tuple[int, ...]:
    return spread.dp_replicate, spread.dp_shard, spread.tp, spread.pp, spread.cp, spread.ep


def _reason(best: Plan, alone: Plan | None, ranks: int) -> str:
    parts = {"computing": best.compute, "waiting for other ranks": best.exposed, "idle in the pipeline": best.idle}
    parts["waiting for weights"] = max(0.0, best.hidden - best.compute)
    text = ", ".join(f"{100 * t / best.seconds:.0f}% {name}" for name, t in parts.items() if t > 0.005 * best.seconds)
    if alone is None:
        other = f"dp_shard {ranks} alone would need {ranks} rows a piece of the batch or more"
    elif alone is best or alone.spread == best.spread:
        other = "the weights are cut, and nothing else has to be"
    elif not alone.fits:
        other = f"dp_shard {ranks} alone needs {alone.peak / 2**30:.1f} GiB a rank"
    else:
        other = f"dp_shard {ranks} alone takes {100 * (alone.seconds / best.seconds - 1):.0f}% longer"
    return f"{best.spread}: the least time of a step ({text}); {other}"


def _can(subject: Subject, layout: ParallelSection, known: dict[Any, bool]) -> bool:
    key = (layout.pp, layout.cp, layout.ep, layout.schedule, layout.tp > 1)
    if key not in known:
        try:
            check(subject.model, layout, subject.seq_len)
            sequence_chunks.check(subject.model, subject.train, layout, DataSection(), False)
            known[key] = True
        except ConfigError:
            known[key] = False
    return known[key]


def _layouts(subject: Subject, ranks: int, node: int) -> Iterator[ParallelSection]:
    """Tensor and context parallelism within a node or two, the pipeline over at most all layers."""
    experts = max((m.num_experts for m in subject.model.modules() if hasattr(m, "num_experts")), default=1)
    for tp, cp, pp in itertools.product(_divisors(ranks, node), _divisors(ranks, MOST_CONTEXT), _divisors(ranks)):
        data, rest = divmod(ranks, tp * cp * pp)
        if rest or pp > subject.num_layers:
            continue
        for copies in _divisors(data):
            shard = data // copies
            if copies > 1 and shard * cp * tp < node <= ranks:
                continue  # copies of the weights in one node
            for ep in _divisors(shard * cp, experts) if tp == 1 else [1]:
                for schedule in ("1F1B", "Interleaved1F1B") if pp > 1 else ("1F1B",):
                    yield ParallelSection(copies, shard, tp, cp, pp, ep, schedule)  # type: ignore[arg-type]


def _divisors(n: int, most: int | None = None) -> list[int]:
    return [d for d in range(1, min(n, most or n) + 1) if n % d == 0]
