"""Which implementation of an op runs: the first of its rows that takes the call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, eq=False)
class Row:
    """One implementation; `refuse` says why it cannot take a call, or None."""

    fn: Callable
    devices: tuple[str, ...] = ()  # any where there are none
    dtypes: tuple[torch.dtype, ...] = ()
    refuse: Callable[..., str | None] | None = None

    def takes(self, *args: Any, **kwargs: Any) -> bool:
        """Whether this row can run a call."""
        if self.devices and args[0].device.type not in self.devices:
            return False
        if self.dtypes and args[0].dtype not in self.dtypes:
            return False
        return self.refuse is None or not self.refuse(*args, **kwargs)


ROWS: dict[str, tuple[Row, ...]] = {}  # filled at the end of the file


def call(op: str, backend: str, *args: Any, **kwargs: Any) -> Any:
    """Run an op. `backend` is a matter of speed, and there is one for every machine here."""
    for row in ROWS[op]:
        if row.takes(*args, **kwargs):
            return row.fn(*args, **kwargs)
    raise NotImplementedError(f"{op} cannot run here: {args[0].dtype} on {args[0].device.type}")


def check_backend(op: str, backend: str) -> None:
    """Backends are a matter of speed: whichever is named, what is here runs."""


def forced(op: str) -> bool:
    """Nobody forces a backend here."""
    return False
