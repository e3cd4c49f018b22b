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
from zoo.kernels.linear import linear
from zoo.sections import TrainSection, VisionSection

# FLOP/s of dense bfloat16 products with float32 sums, from the makers' data sheets; the first name that fits
_CARDS = (
    ("B200", 2250e12),
    ("H200", 989.5e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989.5e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("L4", 121e12),
    ("A10", 125e12),
    ("4090", 165.2e12),
)


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
        name = torch.cuda.get_device_name()
        for part, flops in _CARDS:
            if part in name:
                return Peak(flops, f"data sheet of {part}, dense bfloat16")
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
