"""Accelerators as their makers describe them: memory, speed of matrix products, speed of links."""

from __future__ import annotations

import os
from dataclasses import dataclass

NODE = 8  # accelerators that a fast link joins
ATTAINED = 0.4  # share of the peak that training reaches
USABLE = 0.92  # share of the memory; the rest goes to the driver, communication buffers and fragments


@dataclass(frozen=True)
class Gpu:
    """memory in bytes; FLOP/s of dense products in bfloat16 and float32; bytes/s that one accelerator sends to others
    of its node, and to other nodes through a network card of its own."""

    name: str
    memory: float
    bfloat16: float
    float32: float
    link: float
    network: float

    def speed(self, ranks: int, stride: int) -> float:
        """Bytes/s that each of `ranks` ranks sends, whose numbers are `stride` apart."""
        return self.link if (ranks - 1) * stride < NODE else self.network


def _gpu(name: str, gib: float, bfloat16: float, float32: float, link: float, network: float) -> tuple[str, Gpu]:
    """GiB as the driver reports them, TFLOP/s without sparsity, GB/s in one direction."""
    return name.lower(), Gpu(name, gib * 2**30, bfloat16 * 1e12, float32 * 1e12, link * 1e9, network * 1e9)


# network: one card of 400 Gbit/s for each of the larger ones, 200 for A100 and L40S, 100 for those of a desk
GPUS: dict[str, Gpu] = dict(
    [
        _gpu("H100", 79.6, 989, 67, 450, 50),
        _gpu("H200", 140.4, 989, 67, 450, 50),
        _gpu("B200", 179, 2250, 75, 900, 50),
        _gpu("A100", 80, 312, 19.5, 300, 25),
        _gpu("A100-40", 40, 312, 19.5, 300, 25),
        _gpu("L40S", 45, 362, 91.6, 32, 25),
        _gpu("RTX4090", 24, 165, 82.6, 32, 12.5),
        _gpu("RTX5090", 31.8, 209, 104.8, 64, 12.5),
        _gpu("MI300X", 191.7, 1307, 163.4, 448, 50),
    ]
)


def cpu() -> Gpu:
    """This machine, for runs of several processes: its memory, and guesses of one core's and of memory's speed."""
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Gpu("cpu", pages, 1e11, 1e11, 5e9, 5e9)
