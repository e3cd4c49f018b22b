"""Which kernels were chosen in a pass, node by node."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from zoo.architectures.model import Model
from zoo.kernels.dispatch import Row, watched
from zoo.measure.visits import Paths, Phase, visited

REST = "the rest"
Kernels = dict[str, dict[str, list[str]]]  # backends by path and op


class _Chosen:
    """A visitor that is told of every op."""

    def __init__(self):
        self.here: Paths = (REST,)
        self.found: Kernels = {}

    def enter(self, paths: Paths, phase: Phase) -> None:
        self.here = paths

    def leave(self, paths: Paths, phase: Phase, mark: None) -> None:
        self.here = (REST,)

    def tell(self, row: Row) -> None:
        for path in self.here:
            backends = self.found.setdefault(path, {}).setdefault(row.op, [])
            if row.backend not in backends:
                backends.append(row.backend)


@contextmanager
def chosen(model: Model) -> Iterator[Kernels]:
    """What is chosen inside, filled in as it happens."""
    seen = _Chosen()
    with watched(seen.tell), visited(model, seen):
        yield seen.found
