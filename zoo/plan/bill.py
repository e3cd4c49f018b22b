"""What a training run costs on many devices: hours, energy, money."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

from zoo.devices import Device
from zoo.errors import ConfigError
from zoo.parallel.layout import check
from zoo.plan.plan import Plan, plan
from zoo.plan.propose import propose
from zoo.plan.spread import resolve
from zoo.plan.subject import Subject
from zoo.predict.roofline import Timing
from zoo.sections import DataSection, ParallelSection
from zoo.train import sequence_chunks

_UNITS = {"": 1, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}


@dataclass(frozen=True)
class Bill:
    """Of a run over `tokens` tokens: hours of one device and of all, kWh at the full power of the boards (without
    hosts and cooling), money at a price for an hour of a device. Evaluation, checkpoints and failures are left out."""

    plan: Plan
    tokens: float
    tokens_per_second: float
    steps: int
    hours: float
    gpu_hours: float
    kilowatt_hours: float
    money: float | None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "plan"}
        return {"layout": str(self.plan.spread), "plan": self.plan.as_dict()} | own


def bill(made: Plan, subject: Subject, tokens: float, price: float | None) -> Bill:
    """What `tokens` tokens cost in steps of `made`."""
    per_step = subject.train.batch_size * subject.seq_len
    steps = max(1, round(tokens / per_step))
    hours = steps * made.seconds / 3600
    gpu_hours = hours * made.spread.ranks
    energy = gpu_hours * made.device.power / 1000
    return Bill(
        made, tokens, per_step / made.seconds, steps, hours, gpu_hours, energy,
        None if price is None else price * gpu_hours,
    )  # fmt: skip


def laid_out(subject: Subject, wanted: dict[str, Any], ranks: int, device: Device, timing: Timing) -> Plan:
    """The layout that is `wanted`, or where nothing is, the quickest. ConfigError where it does not fit."""
    if not wanted:
        return propose(subject, ranks, device, timing).best[0]
    layout = ParallelSection.from_mapping(wanted)
    spread = resolve(layout, subject.train, ranks)
    check(subject.model, layout, subject.seq_len)
    sequence_chunks.check(subject.model, subject.train, layout, DataSection(), False)
    return plan(subject, spread, device, timing)


def amount(text: str, option: str) -> float:
    """`10B` -> 1e10; 1e10 and 10_000 will do too."""
    found = re.fullmatch(r"([0-9_.]+(?:e[+-]?[0-9]+)?)([kmbt]?)", text.strip().lower())
    try:
        number = float(found[1]) * _UNITS[found[2]] if found else 0.0
    except ValueError:
        number = 0.0
    if not number > 0:
        raise ConfigError(f"{option} {text}: write a number, as in 10B or 300M")
    return number
