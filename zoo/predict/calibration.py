"""What `zoo calibrate` found out about a device, kept in a file of the user's cache folder."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zoo.architectures.storage import write_atomically
from zoo.bench.machine import device_name, slug
from zoo.devices import Device
from zoo.errors import ZooError
from zoo.kernels.native import cache_dir
from zoo.predict.distance import Curve, seconds_a_byte
from zoo.predict.kinds import KINDS, kind_of
from zoo.predict.work import FEATURES, Around, Work

VERSION = 2
Rates = tuple[float, ...]


@dataclass(frozen=True)
class Environment:
    """What a calibration holds for."""

    device: str
    processor: str
    dtype: str
    threads: int
    torch: str

    @classmethod
    def here(cls, device: str, dtype: str = "float32") -> Environment:
        """Of this process."""
        threads = torch.get_num_threads() if device == "cpu" else 1
        return cls(device, device_name(device), dtype, threads, torch.__version__)

    def changes(self, now: Environment) -> list[str]:
        """In words, what is different now."""
        return [
            f"{f.name} {mine!s} then, {theirs!s} now"
            for f in dataclasses.fields(self)
            if (mine := getattr(self, f.name)) != (theirs := getattr(now, f.name))
        ]


@dataclass(frozen=True, eq=False)
class Calibration:
    """Seconds for each of `Work.features`, by block and mode; they add up, because eager operations come one after
    another. `rest`, by mode: the same of what is `Around` the nodes. `distance`, by mode: what held bytes cost more
    where a pass moves many. `products`: FLOP/s of a square product by its width; `bandwidth` of a copy; `launch`:
    seconds of the smallest call of torch; `reached`: FLOP/s of products of the middle and of the best node, by kind of
    work and mode."""

    environment: Environment
    products: Mapping[int, float]
    bandwidth: float
    launch: float
    blocks: Mapping[tuple[str, str], Rates]
    rest: Mapping[str, Rates]
    distance: Mapping[str, Curve]
    reached: Mapping[str, Mapping[str, tuple[float, float]]]
    error: float  # median relative error of the fit itself

    calibrated = True

    def seconds(self, block: str, mode: str, work: Work) -> float:
        """Of one node."""
        spent = sum(r * x for r, x in zip(self._rates(block, mode), work.features, strict=True))
        return spent + work.held * seconds_a_byte(self.distance.get(mode, ()), work.span)

    def rest_seconds(self, mode: str, around: Around) -> float:
        """Of a pass outside its nodes."""
        return sum(r * x for r, x in zip(self.rest[mode], around.features, strict=True))

    def note(self, block: str) -> str:
        """In words, what the time of a block is taken from if not from its own measurement."""
        if any(name == block for name, _ in self.blocks) or kind_of(block) == "elementwise":
            return ""
        return f"{block} was not calibrated: it is taken for a middling block of its kind ({kind_of(block)})"

    def _rates(self, block: str, mode: str) -> Rates:
        return self.blocks.get((block, mode)) or self._like(kind_of(block), mode)

    @functools.cached_property
    def kinds(self) -> dict[str, dict[str, list[Rates]]]:
        """The blocks' rates by kind of work and mode."""
        found: dict[str, dict[str, list[Rates]]] = {}
        for (block, mode), rates in self.blocks.items():
            found.setdefault(kind_of(block), {}).setdefault(mode, []).append(rates)
        return {kind: found[kind] for kind in KINDS if kind in found}

    @functools.cache  # noqa: B019
    def _like(self, kind: str, mode: str) -> Rates:
        """Of a middling block of a kind; of any kind, where there is none of it."""
        if kind == "elementwise":  # parts of combinators: their time is in the rest
            return (0.0,) * len(FEATURES)
        like = self.kinds.get(kind, {}).get(mode) or [r for (_, m), r in self.blocks.items() if m == mode]
        return tuple(statistics.median(column) for column in zip(*like, strict=True))

    @property
    def device(self) -> Device:
        """As a device among others."""
        peak = max(self.products.values())
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if self.environment.device == "cuda":
            memory = torch.cuda.mem_get_info()[1]
        return Device(
            self.environment.device, memory, self.bandwidth, {self.environment.dtype: peak}, peak, 5e9, 5e9,
            launch=self.launch, source=f"measured: {self.environment.processor}",
        )  # fmt: skip

    # ------------------------------------------------------------------------------------------ files
    def save(self, path: Path | None = None) -> Path:
        """Write it, where `load` looks for it unless a path is given."""
        path = path or folder() / _name(self.environment)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(self.as_dict(), indent=1) + "\n").encode())
        return path

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        blocks: dict[str, dict[str, Rates]] = {}
        for (block, mode), rates in self.blocks.items():
            blocks.setdefault(block, {})[mode] = rates
        return {
            "version": VERSION,
            "environment": dataclasses.asdict(self.environment),
            "products": {str(n): rate for n, rate in self.products.items()},
            "bandwidth": self.bandwidth,
            "launch": self.launch,
            "error": self.error,
            "rates": [f"seconds {feature}" for feature in FEATURES],
            "blocks": blocks,
            "rest": dict(self.rest),
            "distance": dict(self.distance),
            "reached": {kind: dict(modes) for kind, modes in self.reached.items()},
        }

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Calibration:
        """What `as_dict` gave."""
        if document["version"] != VERSION:
            raise ValueError(f"version {document['version']}, not {VERSION}")
        blocks = {(b, m): tuple(r) for b, modes in document["blocks"].items() for m, r in modes.items()}
        return cls(
            Environment(**document["environment"]),
            {int(n): rate for n, rate in document["products"].items()},
            document["bandwidth"], document["launch"], blocks,
            {mode: tuple(r) for mode, r in document["rest"].items()},
            {mode: tuple((span, cost) for span, cost in points) for mode, points in document["distance"].items()},
            document["reached"], document["error"],
        )  # fmt: skip


def folder() -> Path:
    """Where calibrations are kept: ZOO_CACHE, or block-zoo in the user's cache."""
    return cache_dir()


def _name(environment: Environment) -> str:
    e = environment
    return f"calibration_{e.device}_{slug(e.processor)}_{e.dtype}_{e.threads}.json"


def load(device: str, dtype: str = "float32") -> Calibration | None:
    """That of this machine in this state, or the newest of such a device, or none; one of an older Block Zoo, whose
    rates mean something else, is none. See `Environment.changes`."""
    exact = folder() / _name(Environment.here(device, dtype))
    others = sorted(folder().glob(f"calibration_{device}_*.json"), key=lambda p: -p.stat().st_mtime)
    path = exact if exact.exists() else next(iter(others), None)
    if path is None:
        return None
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return None if document["version"] < VERSION else Calibration.from_dict(document)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ZooError(f"{path}: no calibration ({error}); `zoo calibrate` writes a new one") from None
