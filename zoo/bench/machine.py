"""What a result was measured on: the machine, versions, and how fast it multiplies and copies."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.nn import functional as F

from zoo.bench.timing import Runner, race
from zoo.errors import ConfigError, KernelUnavailable, one_of
from zoo.kernels.linear import linear

LIBRARIES = ("transformers", "flash-linear-attention", "mamba-ssm", "xformers", "flash-attn")
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def check_device(device: str) -> None:
    """ConfigError for a device that nothing can be measured on."""
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"--device {device}: can be cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise KernelUnavailable("--device cuda: torch sees no CUDA device here")


def dtype_named(name: str | None, device: str) -> torch.dtype:
    """A dtype by its name; bfloat16 on a GPU and float32 on a CPU where none is given."""
    name = name or ("bfloat16" if device == "cuda" else "float32")
    if name not in DTYPES:
        raise ConfigError(f"--dtype {name}: can be {one_of(DTYPES)}")
    return DTYPES[name]


def device_name(device: str) -> str:
    """The card's or the processor's name."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def slug(name: str) -> str:
    """`NVIDIA H100 80GB HBM3` -> `nvidia_h100_80gb_hbm3`."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    folder = Path(__file__).resolve().parent
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=folder, capture_output=True, text=True)
    return done.stdout.strip() or None


def describe(device: str) -> dict[str, Any]:
    """Machine and versions, for the record."""
    import zoo

    versions = {name: version for name in ("torch", "triton", *LIBRARIES) if (version := _version(name))}
    found: dict[str, Any] = {
        "device": device_name(device),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "zoo": zoo.__version__,
        "versions": versions,
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    with contextlib.suppress(OSError):  # neither is everywhere
        found["load"] = round(os.getloadavg()[0], 2)
        found["commit"] = _commit()
    if device == "cuda":
        found["cuda"] = torch.version.cuda
    else:
        found["vector_units"] = torch.backends.cpu.get_cpu_capability()
    return found


@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    """torch and the C cores use `number` threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Peaks:
    """What this device reaches here: FLOP/s of one product, bytes/s of a copy (read + written) and of reading
    weights to multiply one row by them."""

    flops: float
    copy: float
    stream: float

    def bound_ms(self, flops: float, moved: float, step: bool = False) -> float:
        """No less than this is needed for so much work; a decode step streams its weights and state."""
        return 1e3 * max(flops / self.flops, moved / (self.stream if step else self.copy))

    def as_dict(self) -> dict[str, float]:
        """Rounded, for JSON."""
        return {
            "gflops": round(self.flops / 1e9, 2),
            "copy_gb_s": round(self.copy / 1e9, 3),
            "stream_gb_s": round(self.stream / 1e9, 3),
        }


def peaks(device: str, dtype: torch.dtype, *, width: int | None = None, rounds: int = 7) -> Peaks:
    """Measure them, the best of `rounds`. width: of the square product (default 1024, on a GPU 8192)."""
    n = width or (8192 if device == "cuda" else 1024)
    a, b = torch.randn(n, n, device=device, dtype=dtype), torch.randn(n, n, device=device, dtype=dtype)
    source = torch.empty(16 * n * n, device=device, dtype=torch.uint8).fill_(1)
    target, row = torch.empty_like(source), torch.randn(1, 2 * n, device=device, dtype=dtype)
    weight = torch.randn(8 * n, 2 * n, device=device, dtype=dtype)
    runners = {
        "mm": Runner(lambda: torch.mm(a, b)),
        "linear": Runner(lambda: linear(a, b)),  # on a CPU another library's product
        "copy": Runner(lambda: target.copy_(source)),
        "stream": Runner(lambda: F.linear(row, weight)),
    }
    with torch.no_grad():
        for runner in runners.values():
            runner.run()
        seconds = {name: t.least / 1e3 for name, t in race(runners, device, rounds).items()}
    return Peaks(
        flops=2 * n**3 / min(seconds["mm"], seconds["linear"]),
        copy=2 * source.numel() / seconds["copy"],
        stream=weight.numel() * weight.element_size() / seconds["stream"],
    )


def free_memory(device: str) -> float:
    """Bytes that can still be had; infinite where the system does not tell."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                return 1024 * int(line.split()[1])
    return float("inf")


@contextlib.contextmanager
def memory_peak(device: str) -> Iterator[dict[str, int | None]]:
    """`["bytes"]` afterwards: how much memory was in use at the most, beyond what was before. None where the
    system does not tell."""
    found: dict[str, int | None] = {"bytes": None}
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield found
        torch.cuda.synchronize()
        found["bytes"] = torch.cuda.max_memory_allocated() - before
        return
    before = _reset_resident_peak()
    yield found
    if before is not None:
        found["bytes"] = max(_status("VmHWM") - before, 0)
        _allocator(_LARGEST)


class Calm:
    """Measures again what others disturbed: who used more than `DISTURBED` of a processor meanwhile. `tries` more
    measurements are made in all, then what comes is taken."""

    def __init__(self, tries: int):
        self.tries = tries

    def __call__(self, measure: Callable[[], _T]) -> _T:
        while True:
            before, start = _others(), time.perf_counter()
            found = measure()
            if self.tries <= 0 or _others() - before < DISTURBED * (time.perf_counter() - start):
                return found
            self.tries -= 1
            time.sleep(0.5)


_T = TypeVar("_T")
DISTURBED = 0.2  # in a third of a second, the system's own count is right to a tenth


def _others() -> float:
    """Seconds that all processors together have worked for other processes; 0 where the system does not tell."""
    try:
        user, nice, system, *_ = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:])
    except (OSError, ValueError):
        return 0.0
    return (user + nice + system) / os.sysconf("SC_CLK_TCK") - time.process_time()


@contextlib.contextmanager
def memory_kept() -> Iterator[None]:
    """Inside, memory that is freed stays with the process. By itself glibc gives it back and takes it again, now and
    then in the middle of a pass, page by page: up to a tenth of the time of a large one."""
    try:
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _LARGEST)
        ctypes.CDLL(None).mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    except (OSError, AttributeError):  # another libc
        yield
        return
    try:
        yield
    finally:
        _allocator(_LARGEST)


_LARGEST = 32 << 20  # what glibc arrives at by itself in a long run, and its maximum
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt: blocks above come from the system one by one


def _allocator(large: int) -> None:
    """Blocks of `large` bytes go back to the system as soon as they are freed."""
    libc = ctypes.CDLL(None)
    libc.mallopt(_MMAP_THRESHOLD, large)
    libc.mallopt(_TRIM_THRESHOLD, 2 * large)
    libc.malloc_trim(0)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise OSError(field)


def _reset_resident_peak() -> int | None:
    """Resident bytes now, after the system was told to forget its high-water mark; None where it cannot."""
    gc.collect()
    try:
        # what is free must not hide what is needed next, and a tensor that is freed must be gone
        _allocator(1 << 20)
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except (OSError, AttributeError):
        return None
