"""How much of the machine a run uses: model FLOPs utilisation (MFU, arXiv:2204.02311) and peak memory."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

import zoo
from zoo import devices
from zoo.kernels.linear import linear
from zoo.sections import TrainSection, VisionSection


@dataclass(frozen=True)
class Peak:
    """FLOP/s that one device could do, and where the figure is from."""

    flops: float
    source: str


@dataclass(frozen=True)
class Speed:
    """What a step must compute (by the cost model, so without recomputation) and what the device could."""

    flops_per_step: int
    peak: Peak

    def mfu(self, seconds: float, devices: int = 1) -> float:
        """Share of the devices' peak that a step of so many seconds used."""
        return self.flops_per_step / (seconds * devices * self.peak.flops)

    def as_dict(self) -> dict[str, Any]:
        """For environment.json."""
        return {"flops_per_step": self.flops_per_step, "peak_flops": self.peak.flops, "peak_from": self.peak.source}


def speed_of(document: dict[str, Any], train: TrainSection) -> Speed | None:
    """None where a step is more than one pass of the model over its rows: with a teacher, in block diffusion."""
    if document.get("diffusion") or document.get("distill"):
        return None
    length = VisionSection.from_mapping(document["vision"]).num_tokens if "vision" in document else train.seq_len
    report = zoo.estimate(document, batch_size=train.batch_size, seq_len=length, mode="train")
    return Speed(report.flops, peak("cuda" if torch.cuda.is_available() else "cpu"))


@lru_cache
def peak(device: str) -> Peak:
    """Of a known card what its maker says; else what a product reaches here."""
    if device == "cuda":
        card = devices.recognised(torch.cuda.get_device_name())
        if card:
            return Peak(card.flops("bfloat16"), f"data sheet of {card.name}, dense bfloat16")
    n, dtype = (8192, torch.bfloat16) if device == "cuda" else (1024, torch.float32)
    a, b = (torch.ones(n, n, device=device, dtype=dtype) for _ in range(2))
    least = float("inf")
    with torch.no_grad():
        for product in (torch.mm, linear):  # on a CPU these are two libraries
            for _ in range(4):
                start = _now(device)
                product(a, b)
                least = min(least, _now(device) - start)
    where = f"{torch.get_num_threads()} threads" if device == "cpu" else torch.cuda.get_device_name()
    return Peak(2 * n**3 / least, f"measured: a {n} x {n} product in {str(dtype).removeprefix('torch.')}, {where}")


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_memory() -> int:
    """Bytes this process held at the most: on the card, or where there is none in the machine."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
