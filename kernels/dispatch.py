"""One table of kernels: rows (op, backend, priority, constraints). The fastest legal row wins.

An op's package registers its rows when it is imported; `kernel:` in a config, the `backend` argument of an op
and `zoo.kernels.use(op=backend)` override the choice. `explain` says why each row was or was not chosen.
"""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from zoo.errors import ConfigError, KernelUnavailable, did_you_mean

AUTO = "auto"
_ANY_DTYPE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)  # compared as what they are, one entry each: hashing every field would cost each call
class Row:
    """One implementation of an op. The three questions are asked in turn, each answers with the reason why this
    row cannot run, or None: `missing()` looks at the machine, `unfit(device)` at one device, and
    `refuse(*args, **kwargs)` at a call. `fn` may be "module:function", imported on first use."""

    op: str
    backend: str
    fn: Callable | str
    priority: int = 0
    devices: tuple[str, ...] = ("cpu", "cuda", "meta")
    min_capability: tuple[int, int] | None = None
    dtypes: tuple[torch.dtype, ...] = _ANY_DTYPE
    missing: Callable[[], str | None] | None = None
    unfit: Callable[[torch.device], str | None] | None = None
    refuse: Callable[..., str | None] | None = None
    by_name: tuple[str, ...] = ()  # devices on which this row runs only where it is asked for by name

    def objection(self, device: torch.device, dtype: torch.dtype | None, named: bool = False) -> str | None:
        """Why this row cannot run on a device and dtype at all, or None. named: it was asked for by its name."""
        if device.type not in self.devices and not (named and device.type in self.by_name):
            return f"runs on {' and '.join(d for d in self.devices if d != 'meta')}, not on {device.type}"
        if dtype is not None and dtype not in self.dtypes:
            return f"does not take {str(dtype).removeprefix('torch.')}"
        return _unable(self, str(device))

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Call the implementation."""
        return (_imported(self.fn) if isinstance(self.fn, str) else self.fn)(*args, **kwargs)


_answers: dict[tuple[Row, str], str | None] = {}


@torch.compiler.assume_constant_result
def _unable(row: Row, device: str) -> str | None:
    """What the machine and the device object to; asked once, and never traced."""
    if (row, device) not in _answers:
        _answers[row, device] = _asked(row, device)
    return _answers[row, device]


def _asked(row: Row, device: str) -> str | None:
    if row.missing and (why := row.missing()):
        return why
    where = torch.device(device)
    if row.min_capability and where.type == "cuda":
        have = torch.cuda.get_device_capability(where)
        if have < row.min_capability:
            return "needs sm_{}{}, this is sm_{}{}".format(*row.min_capability, *have)
    return row.unfit(where) if row.unfit else None


@torch.compiler.assume_constant_result
def _imported(path: str) -> Callable:
    module, name = path.split(":")
    return getattr(importlib.import_module(module), name)


_rows: dict[str, list[Row]] = {}
_overrides: dict[str, str] = {}


def register_row(op: str, backend: str, fn: Callable | str, **constraints: Any) -> None:
    """Add an implementation of `op`. The highest `priority` among the legal rows is chosen."""
    rows = _rows.setdefault(op, [])
    rows[:] = [r for r in rows if r.backend != backend] + [Row(op, backend, fn, **constraints)]
    rows.sort(key=lambda r: -r.priority)


def ops() -> list[str]:
    """Names of all ops."""
    package = importlib.import_module("zoo.kernels")
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if m.ispkg)


def rows(op: str) -> list[Row]:
    """Rows of an op, best first."""
    if op not in _rows:
        if op not in ops():
            raise ConfigError(f"unknown op {op!r}{did_you_mean(op, ops())}; ops: {', '.join(ops())}")
        importlib.import_module(f"zoo.kernels.{op}")
    return _rows.get(op, [])


def backends(op: str) -> tuple[str, ...]:
    """Backends of an op, best first."""
    return tuple(r.backend for r in rows(op))


def check_backend(op: str, backend: str) -> None:
    """Raise ValueError where `backend` is neither `auto` nor a backend of `op`."""
    if backend != AUTO and backend not in backends(op):
        raise ValueError(
            f"kernel {backend!r} is not known for {op}{did_you_mean(backend, backends(op))}; "
            f"one of auto, {', '.join(backends(op))}"
        )


def call(op: str, backend: str, *args: Any, **kwargs: Any) -> Any:
    """Run `op` on its first tensor argument's device by the best legal row, or by `backend` alone."""
    first = args[0]
    wanted = _overrides.get(op, backend)
    refused = []
    for row in _rows[op]:
        if wanted not in (AUTO, row.backend):
            continue
        why = row.objection(first.device, first.dtype, wanted == row.backend)
        why = why or (row.refuse and row.refuse(*args, **kwargs))
        if not why:
            for tell in _watchers:
                tell(row)
            return row.run(*args, **kwargs)
        refused.append(f"{row.backend}: {why}")
    if not refused:
        raise KernelUnavailable(f"{op} has no backend {wanted!r}{did_you_mean(wanted, backends(op))}")
    raise KernelUnavailable(f"{op} cannot run here by {wanted!r}: " + "; ".join(refused))


def explain(op: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> list[tuple[Row, str]]:
    """Each row of an op with the word `chosen`, `standby` or the reason why it is refused."""
    device, out, chosen = torch.device(device), [], False
    for row in rows(op):
        why = row.objection(device, dtype)
        out.append((row, why or ("standby" if chosen else "chosen")))
        chosen = chosen or not why
    return out


_watchers: list[Callable[[Row], Any]] = []


@contextlib.contextmanager
def watched(tell: Callable[[Row], Any]) -> Iterator[None]:
    """Inside, `tell` is given the row of every op that is called."""
    _watchers.append(tell)
    try:
        yield
    finally:
        _watchers.remove(tell)


def forced(op: str) -> bool:
    """Is a backend of `op` forced by `use`?"""
    return op in _overrides


@contextlib.contextmanager
def use(**choice: str) -> Iterator[None]:
    """`with zoo.kernels.use(linear_attention="reference"):` forces backends inside the block."""
    for op, backend in choice.items():
        rows(op)
        if backend != AUTO and backend not in backends(op):
            known = ", ".join(backends(op))
            raise KernelUnavailable(
                f"{op} has no backend {backend!r}{did_you_mean(backend, backends(op))}; it has {known}"
            )
    before = dict(_overrides)
    _overrides.update(choice)
    try:
        yield
    finally:
        _overrides.clear()
        _overrides.update(before)
