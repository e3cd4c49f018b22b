"""Devices as their makers describe them: what they can do at most, what joins them, what they draw.

Figures are of dense products, without sparsity. One line a device and a source; `load` reads one from a file.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zoo.errors import ConfigError, Problem, did_you_mean, one_of

USABLE = 0.92  # share of the memory; the rest goes to the driver, communication buffers and fragments
DTYPES = ("float64", "float32", "bfloat16", "float16", "float8")


@dataclass(frozen=True)
class Device:
    """memory in bytes and bandwidth in bytes/s; FLOP/s of matrix products by dtype (float32 as torch computes it, not
    in TensorFloat-32) and of all other work; bytes/s that one device sends to others of its node of `node` devices,
    and to other nodes through a network card of its own; seconds that a launch costs; watts of the whole board."""

    name: str
    memory: float
    bandwidth: float
    matrix: Mapping[str, float]
    vector: float
    link: float
    network: float
    node: int = 8
    launch: float = 5e-6
    power: float = 0.0
    source: str = ""
    also: tuple[str, ...] = field(default=(), repr=False)  # parts of names by which torch knows it

    def speed(self, ranks: int, stride: int) -> float:
        """Bytes/s that each of `ranks` ranks sends, whose numbers are `stride` apart."""
        return self.link if self.joins(ranks, stride) else self.network

    def joins(self, ranks: int, stride: int) -> bool:
        """Whether such ranks lie in one node."""
        return (ranks - 1) * stride < self.node

    def flops(self, dtype: str) -> float:
        """FLOP/s of products in `dtype`. ConfigError where the device has no unit for it."""
        if dtype not in self.matrix:
            raise ConfigError(f"{self.name} has no products in {dtype}; {one_of(self.matrix)}")
        return self.matrix[dtype]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self) | {"matrix": dict(self.matrix), "also": list(self.also)}


def _gpu(
    name: str, memory: float, bandwidth: float, f64: float, f32: float, f16: float, f8: float | None, vector: float,
    link: float, network: float, power: float, source: str, **more: Any,
) -> Device:  # fmt: skip
    """GiB as the driver reports them, GB/s, TFLOP/s, GB/s in one direction, watts."""
    rates = {"float64": f64, "float32": f32, "bfloat16": f16, "float16": f16} | ({"float8": f8} if f8 else {})
    matrix = {dtype: 1e12 * rate for dtype, rate in rates.items()}
    return Device(
        name, memory * 2**30, bandwidth * 1e9, matrix, vector * 1e12, link * 1e9, network * 1e9,
        power=power, source=source, **more,
    )  # fmt: skip


# network: one card of 400 Gbit/s for each of the larger ones, 200 for A100 and L40S, 100 for those of a desk; a launch
# from Python: 5 us, somewhat more on ROCm. The columns: name, memory, bandwidth, products in float64, float32, 16 bits
# and 8 bits, other work (float32), link, network, watts
_TABLE = (
    _gpu("H100", 79.6, 3350, 67, 67, 989.5, 1979, 67, 450, 50, 700, "NVIDIA H100 data sheet, SXM5"),
    _gpu("H100-PCIe", 79.6, 2039, 51, 51, 756, 1513, 51, 64, 50, 350, "NVIDIA H100 PCIe product brief",
         also=("H100 PCIe",)),
    _gpu("H100-NVL", 93.6, 3938, 60, 60, 835, 1671, 60, 300, 50, 400, "NVIDIA H100 data sheet, NVL",
         also=("H100 NVL",)),
    _gpu("H200", 140.4, 4800, 67, 67, 989.5, 1979, 67, 450, 50, 700, "NVIDIA H200 data sheet, SXM"),
    _gpu("B200", 179, 7700, 37, 75, 2250, 4500, 75, 900, 50, 1000, "NVIDIA Blackwell data sheet, HGX B200, one GPU"),
    _gpu("A100", 79.1, 2039, 19.5, 19.5, 312, None, 19.5, 300, 25, 400, "NVIDIA A100 data sheet, SXM4 80 GB"),
    _gpu("A100-40", 39.4, 1555, 19.5, 19.5, 312, None, 19.5, 300, 25, 400, "NVIDIA A100 data sheet, SXM4 40 GB",
         also=("A100-SXM4-40GB", "A100-PCIE-40GB")),
    _gpu("A10", 22.5, 600, 0.98, 31.2, 125, None, 31.2, 32, 12.5, 150, "NVIDIA A10 data sheet"),
    _gpu("L40S", 45, 864, 1.43, 91.6, 362, 733, 91.6, 32, 25, 350, "NVIDIA L40S data sheet"),
    _gpu("L4", 22.5, 300, 0.47, 30.3, 121, 242, 30.3, 32, 12.5, 72, "NVIDIA L4 data sheet"),
    _gpu("RTX4090", 23.5, 1008, 1.29, 82.6, 165.2, 330, 82.6, 32, 12.5, 450, "NVIDIA Ada paper, 32-bit sums",
         also=("RTX 4090",)),
    _gpu("RTX5090", 31.8, 1792, 1.64, 104.8, 209.5, 419, 104.8, 64, 12.5, 575,
         "NVIDIA RTX Blackwell paper, 32-bit sums", also=("RTX 5090",)),
    _gpu("MI300X", 191.7, 5300, 163.4, 163.4, 1307.4, 2614.9, 163.4, 448, 50, 750, "AMD Instinct MI300X data sheet",
         launch=8e-6),
)  # fmt: skip
DEVICES: dict[str, Device] = {device.name.lower(): device for device in _TABLE}


def cpu() -> Device:
    """This machine, for runs of several processes: its memory, and guesses of the rest. See `zoo calibrate`."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    matrix = {"float64": 5e10, "float32": 1e11, "bfloat16": 1e11, "float16": 1e10}
    return Device("cpu", memory, 1e10, matrix, 2e10, 5e9, 5e9, launch=1e-5, power=100.0, source="guesses")


def named(name: str, option: str = "--device") -> Device:
    """A device by its name, `cpu` for this machine, or of a YAML file. ConfigError, with the nearest names."""
    if name.lower().endswith((".yaml", ".yml")):
        return load(name)
    key = name.lower().replace(" ", "").replace("_", "-")
    if key == "cpu":
        return cpu()
    if key not in DEVICES:
        hint = did_you_mean(key, [*DEVICES, "cpu", "cuda"])
        known = one_of([*(d.name for d in DEVICES.values()), "cpu"])
        raise ConfigError(f"{option} {name}: unknown{hint}; {known}, or a YAML file that describes one")
    return DEVICES[key]


def recognised(card: str) -> Device | None:
    """The device that torch calls `card`."""
    for device in sorted(DEVICES.values(), key=lambda d: -max(map(len, (d.name, *d.also)))):
        words = card.replace("-", " ").split()
        if any(part in card for part in device.also) or device.name in words:
            return device
    return None


# ----------------------------------------------------------------------------------------------- files
_NUMBERS = ("memory", "bandwidth", "vector", "link", "network", "launch", "power")
_NEEDED = ("name", "memory", "bandwidth", "matrix", "vector")


def load(path: str | Path) -> Device:
    """A device of a YAML file: the fields of `Device` in bytes, bytes/s, FLOP/s, seconds and watts. ConfigError with
    everything that is wrong in it."""
    import yaml

    path = Path(path)
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}:{where} no YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: must be a mapping with {', '.join(_NEEDED)}")
    problems = list(_wrong(found))
    if problems:
        raise ConfigError([Problem(text, where, file=str(path)) for where, text in problems])
    numbers = {"link": 16e9, "network": 3e9} | {k: float(found[k]) for k in _NUMBERS if k in found}
    matrix = {dtype: float(rate) for dtype, rate in found["matrix"].items()}
    more: dict[str, Any] = {"node": found.get("node", 8), "source": str(found.get("source", path))}
    return Device(name=str(found["name"]), matrix=matrix, **numbers, **more)


def _wrong(found: dict) -> Any:
    """Where and what."""
    known = (*_NUMBERS, "name", "matrix", "node", "source")
    for key in found:
        if key not in known:
            yield str(key), f"unknown field{did_you_mean(str(key), known)}"
    for key in _NEEDED:
        if key not in found:
            yield key, "is missing"
    for key in _NUMBERS:
        if key in found and not _positive(found[key]):
            yield key, f"must be a positive number, got {found[key]!r}"
    if "node" in found and not (type(found["node"]) is int and found["node"] > 0):
        yield "node", f"must be a positive integer, got {found['node']!r}"
    matrix = found.get("matrix", {"float32": 1})
    if not isinstance(matrix, dict) or not matrix:
        yield "matrix", f"must map dtypes to FLOP/s, got {matrix!r}"
        return
    for key, value in matrix.items():
        if key not in DTYPES:
            yield f"matrix.{key}", f"unknown dtype; {one_of(DTYPES)}"
        elif not _positive(value):
            yield f"matrix.{key}", f"must be a positive number, got {value!r}"


def _positive(value: Any) -> bool:
    """YAML reads 3.35e12 as text, and 3.35e+12 as a number: both will do."""
    try:
        return not isinstance(value, bool) and 0 < float(value) < float("inf")
    except (TypeError, ValueError):
        return False
