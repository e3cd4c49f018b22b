"""What all Triton rows share: whether they can run here, which GPU x compiler pairs are known to go wrong and what
is done about it, tuned launch options, and the check of a row against its op's definition on a new GPU."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.util
import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from zoo.kernels import dispatch
from zoo.kernels.compare import differentiable, first_difference
from zoo.kernels.native import cache_dir

_HERE = Path(__file__).resolve().parent
_SAFE_PTXAS = (13, 3)  # the first that keeps the registers of an asynchronous wgmma until they are read
SHARED_MEMORY = {80: 166912, 90: 232448, 100: 232448}  # bytes a block may ask for; Triton compiles more and then fails


def interpreting() -> bool:
    """Does Triton run its kernels in its interpreter, as this process was started with TRITON_INTERPRET=1?"""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def register_triton_row(op: str, fn: str, *, priority: int = 30, **constraints: Any) -> None:
    """Add the `triton` row of an op, implemented by "module:function". On a CPU it can only be interpreted, and
    only where it is asked for by name."""
    constraints = {"devices": ("cuda",), "by_name": ("cpu",), "min_capability": (8, 0)} | constraints
    constraints.setdefault("dtypes", (torch.float32, torch.bfloat16, torch.float16))
    unfit = functools.partial(_unfit, op)
    dispatch.register_row(op, "triton", fn, priority=priority, missing=_missing, unfit=unfit, **constraints)


def _missing() -> str | None:
    return None if importlib.util.find_spec("triton") else "triton is not installed"


def _unfit(op: str, device: torch.device) -> str | None:
    if device.type == "cpu":
        return None if interpreting() else "on a CPU only interpreted: start Python with TRITON_INTERPRET=1"
    capability = torch.cuda.get_device_capability(device)
    return refusal(capability, _triton_version()) or checked(op, "triton", device)


# ---------------------------------------------------------------------------------------------- known wrong pairs


def refusal(capability: tuple[int, int], triton: tuple[int, ...]) -> str | None:
    """Why no kernel of ours may run on this GPU with this Triton, or None."""
    if capability == (10, 3) and (3, 6) <= triton < (3, 9):
        return "sm_103 with Triton 3.6 to 3.8 adds up two products wrongly (triton #10821): use Triton 3.9 or newer"
    return None


def needs_old_tensor_cores(capability: tuple[int, int], triton: tuple[int, ...], ptxas: tuple[int, ...]) -> bool:
    """Hopper's asynchronous wgmma is assembled wrongly by ptxas before 13.3 (triton #9433), and Triton 3.4 to 3.7.0
    orders it wrongly in gated backward kernels (fla #640). mma.sync, half as fast, is right with all of them."""
    return capability[0] == 9 and (ptxas < _SAFE_PTXAS or (3, 4) <= triton < (3, 7, 1))


def max_warps(capability: tuple[int, int], triton: tuple[int, ...]) -> int:
    """Blackwell with Triton before 3.8: kernels of 8 warps race (triton #10590)."""
    return 4 if capability[0] >= 10 and triton < (3, 8) else 8


@functools.cache
def _triton_version() -> tuple[int, ...]:
    import triton

    return tuple(int(n) for n in re.findall(r"\d+", triton.__version__)[:3])


@functools.cache
def _ptxas_version() -> tuple[int, ...]:
    from triton import knobs

    tool = knobs.nvidia.ptxas_blackwell if _triton_version() >= (3, 9) else knobs.nvidia.ptxas
    said = subprocess.run([tool.path, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+)\.(\d+)", said)
    return (int(found[1]), int(found[2])) if found else (0, 0)


@functools.cache
def _pair(device: int) -> tuple[bool, int]:
    """Of a GPU: must it keep to mma.sync, and how many warps may a kernel have."""
    capability, triton = torch.cuda.get_device_capability(device), _triton_version()
    return needs_old_tensor_cores(capability, triton, _ptxas_version()), max_warps(capability, triton)


@contextlib.contextmanager
def launching(x: torch.Tensor) -> Iterator[None]:
    """Every launch of ours stands inside: x's GPU is the current one, and the compiler keeps to what is right there.
    The switch is set for our launches alone, other people's kernels are not slowed down."""
    if not x.is_cuda:
        yield
        return
    with torch.cuda.device(x.device):
        if not _pair(x.device.index)[0] or "DISABLE_MMA_V3" in os.environ:
            yield
            return
        os.environ["DISABLE_MMA_V3"] = "1"
        try:
            yield
        finally:
            del os.environ["DISABLE_MMA_V3"]


# ------------------------------------------------------------------------------------------------- tuned options


def tuned_path(card: str) -> Path:
    """Where the options tuned for a card stand."""
    return _HERE / "tuned" / f"{re.sub(r'[^a-z0-9]+', '_', card.lower()).strip('_')}.json"


@functools.cache
def tuned(card: str) -> dict[str, dict[str, int]]:
    """The options tuned for a card: by kernel and sizes."""
    path = tuned_path(card)
    return json.loads(path.read_text()) if path.exists() else {}


def allowed(config: dict[str, int], x: torch.Tensor) -> dict[str, int]:
    """A configuration with no more warps than are right on x's GPU."""
    return {**config, "num_warps": min(config.get("num_warps", 4), _pair(x.device.index)[1])}


def options(kernel: str, x: torch.Tensor, configs: list[dict[str, int]], **sizes: int) -> dict[str, int]:
    """Launch options (block sizes, num_warps, num_stages) of a kernel: what `zoo bench --tune` kept for this card
    and these sizes, else the first of `configs`, which must be safe on every GPU."""
    seen[kernel] = configs
    key = " ".join([kernel, *(f"{name}={size}" for name, size in sorted(sizes.items()))])
    asked.setdefault(kernel, set()).add(key)
    if kernel in forced:
        return forced[kernel]
    if not x.is_cuda:
        return configs[0]
    return allowed(tuned(torch.cuda.get_device_name(x.device)).get(key, configs[0]), x)


forced: dict[str, dict[str, int]] = {}  # kernel -> options, while tuning and while testing each configuration
seen: dict[str, list[dict[str, int]]] = {}  # kernel -> configurations it was asked to choose from
asked: dict[str, set[str]] = {}  # kernel -> the keys of the sizes it was asked for


# -------------------------------------------------------------------------------------------------- first-use check


def checked(op: str, backend: str, device: torch.device) -> str | None:
    """Compare a row with the definition on this GPU once; the verdict is kept for this card, source and compiler."""
    if device.type != "cuda":
        return None
    # the op's own files, what all share, and the kernels it may have from another op
    files = {*(_HERE / op).glob("*.py"), *_HERE.glob("*.py"), *_HERE.glob("*/triton*.py")}
    source = b"".join(p.read_bytes() for p in sorted(files))
    identity = (torch.cuda.get_device_name(device), torch.__version__, _triton_version(), _ptxas_version())
    key = f"{op} {backend} {hashlib.sha256(repr(identity).encode() + source).hexdigest()[:24]}"
    path = cache_dir() / "verified.json"
    with contextlib.suppress(OSError, ValueError):
        if key in (kept := json.loads(path.read_text())):
            return kept[key]
    verdict = self_check(op, backend, device)
    with contextlib.suppress(OSError, ValueError):
        kept = json.loads(path.read_text()) if path.exists() else {}
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(f".{os.getpid()}")
        scratch.write_text(json.dumps(kept | {key: verdict}))
        os.replace(scratch, path)
    return verdict


def self_check(op: str, backend: str, device: torch.device) -> str | None:
    """How a row of an op differs from its definition on the op's examples, or None."""
    examples: Callable = importlib.import_module(f"zoo.kernels.{op}.examples").examples
    rows = {row.backend: row for row in dispatch.rows(op)}
    row = rows[backend]
    for dtype in (d for d in (torch.float32, torch.bfloat16) if d in row.dtypes):
        for name, args in examples(device, dtype):
            if row.refuse and row.refuse(*differentiable(args)):
                continue
            try:
                difference = first_difference(row.run, rows["reference"].run, args)
            except Exception as error:  # a compiler can fail in any way; the next row still serves
                difference = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
            if difference:
                return f"failed its check on this GPU ({name}, {str(dtype).removeprefix('torch.')}): {difference}"
    return None
