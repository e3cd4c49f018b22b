"""C cores of ops: compiled for this processor on first use, kept in the user's cache, never required.

An op's `native.c` includes `native.h` and is built once per dtype (`REAL` is float or double). Its functions take
the number of threads first, then pointers, int64 and double. A machine without a C compiler, or one on which the
build fails, gets the reason as the objection of the op's `native` row and runs the next row.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_HERE = Path(__file__).resolve().parent
_REALS = {torch.float32: "float", torch.float64: "double"}
# sums may be reordered (that is what vectorises them); infinities and NaN keep their meaning
_FLAGS = (
    "-std=gnu11", "-O3", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros",
    "-fassociative-math", "-ffp-contract=fast",
)  # fmt: skip
# the first set that the compiler takes; a compiler without OpenMP runs on one thread
_OPTIONAL = (
    ("-march=native", "-mprefer-vector-width=512", "-fopenmp"),
    ("-march=native", "-fopenmp"),
    ("-march=native",),
    (),
)


def cache_dir() -> Path:
    """Where compiled cores and the verdicts of self-checks are kept: ZOO_CACHE, or block-zoo in the user's cache."""
    base = os.environ.get("ZOO_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "block-zoo"
    return Path(base)


@functools.cache
def _compiler() -> str | None:
    named = os.environ.get("CC")
    return next((path for c in (named, "cc", "gcc", "clang") if c and (path := shutil.which(c))), None)


@functools.cache
def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
    except OSError:
        return platform.platform()


@functools.cache
def _build(op: str, real: str) -> Path | str:
    """The shared library of an op, or why there is none."""
    compiler = _compiler()
    if compiler is None or os.name != "posix":
        return "no C compiler was found (cc, gcc or clang)"
    source = _HERE / op / "native.c"
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    headers = (*sorted(_HERE.glob("*.h")), *sorted((_HERE / op).glob("*.h")))
    text = source.read_text() + "".join(header.read_text() for header in headers)
    key = hashlib.sha256("\0".join((text, real, version, _processor(), *_FLAGS)).encode()).hexdigest()[:24]
    for folder in (cache_dir() / "native", Path(tempfile.gettempdir()) / f"block-zoo-{os.getuid()}"):
        target = folder / f"{op}-{real}-{key}.so"
        if target.exists():
            return target
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if folder.stat().st_uid != os.getuid():
                continue  # somebody else's folder: nothing in it is ours to load
            return _compile(compiler, source, real, target)
        except OSError:  # read-only or full: the next folder
            continue
        except subprocess.CalledProcessError as error:
            complaint = next(iter(error.stderr.strip().splitlines()), "no message")
            return f"{Path(compiler).name} could not build it: {complaint}"
    return f"no folder to build it in ({cache_dir()} cannot be written)"


def _compile(compiler: str, source: Path, real: str, target: Path) -> Path:
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        built = Path(folder) / target.name
        for optional in _OPTIONAL:
            command = [compiler, *_FLAGS, *optional, f"-DREAL={real}", f"-DREAL_IS_{real.upper()}", f"-I{_HERE}"]
            done = subprocess.run([*command, str(source), "-o", str(built), "-lm"], capture_output=True, text=True)
            if done.returncode == 0:
                os.replace(built, target)  # several processes may build at once: the last one wins, all are equal
                return target
        raise subprocess.CalledProcessError(done.returncode, compiler, stderr=done.stderr)


@functools.cache
def _library(op: str, dtype: torch.dtype) -> ctypes.CDLL:
    built = _build(op, _REALS[dtype])
    if isinstance(built, str):
        raise RuntimeError(f"the native core of {op} is not available: {built}")
    return ctypes.CDLL(str(built))


@functools.cache
def missing(op: str) -> str | None:
    """Why the native core of an op cannot be used on this machine, or None. Builds it the first time."""
    built = _build(op, "float")
    return built if isinstance(built, str) else None


_functions: dict[tuple[str, str, torch.dtype], Any] = {}


def run(op: str, function: str, dtype: torch.dtype, *args: Tensor | int | float | None) -> None:
    """Call a C function of an op built for `dtype` (float32 or float64): `function(threads, ...)`, where a tensor
    (contiguous, kept alive by the caller) arrives as a pointer, None as NULL, an int as int64_t and a float as
    double. What each argument is, is learned from the first call."""
    call = _functions.get((op, function, dtype))
    if call is None:
        call = getattr(_library(op, dtype), function)
        call.restype, call.argtypes = None, [ctypes.c_int64, *map(_c_type, args)]
        _functions[op, function, dtype] = call
    call(torch.get_num_threads(), *[a.data_ptr() if isinstance(a, Tensor) else a for a in args])


def _c_type(value: Tensor | int | float | None) -> type:
    if value is None or isinstance(value, Tensor):
        return ctypes.c_void_p
    return ctypes.c_double if isinstance(value, float) else ctypes.c_int64


def untraceable() -> str | None:
    """Why no native core can stand in a graph that leaves this program, or under a function transform."""
    if torch.compiler.is_exporting():
        return "torch.export wants plain operations"
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return "torch.func transforms want plain operations"
    return None


def better_fused(tokens: int) -> str | None:
    """Why a core should not do so few tokens of a graph that torch.compile makes: an opaque operator costs more than
    the equation of one token, which the compiler melts into what stands around it."""
    return "torch.compile fuses one token better" if tokens == 1 and torch.compiler.is_compiling() else None


def watched(*tensors: Tensor | None) -> str | None:
    """What differentiates, traces, counts or fakes operators here, or None: then a core may be called without an
    operator around it, whose cost is above that of a decode step."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or _transformed():
        return "is called where no operator is traced, counted or transformed"
    for x in tensors:
        if x is not None and type(x) not in (Tensor, torch.nn.Parameter):
            return "takes plain tensors only"
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return "has no gradient"
    return None


def _transformed() -> bool:
    return torch._C._are_functorch_transforms_active() or torch.is_autocast_enabled("cpu")
