"""Memory of a pass and of each node in it, in a pass of its own: what the allocator hands out and takes back."""

from __future__ import annotations

import os
import sys
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch.autograd.profiler import profile, record_function

from zoo.architectures.model import Model
from zoo.measure.passes import Pass
from zoo.measure.visits import Paths, Phase, parts, visited


@dataclass(frozen=True)
class Memory:
    """Bytes. `held` before the pass: weights, buffers and state; `peak`: beyond that, at the most; `kept`: beyond that
    when backward begins. `nodes`: what each took at the most while it was at work, beyond what there was before."""

    held: int
    peak: int
    kept: int
    nodes: dict[str, int]


def memory_of(model: Model, once: Pass, device: str) -> Memory:
    """Measure one pass. Other passes must have warmed up what is kept between passes."""
    once.prepare()
    return _of_card(model, once) if device == "cuda" else _of_allocator(model, once)


# ------------------------------------------------------------------------------------------ processors
class Ranges:
    """A visitor that opens ranges of the profiler."""

    def enter(self, paths: Paths, phase: Phase) -> Any:
        opened = record_function(label(paths, phase))
        opened.__enter__()
        return opened

    def leave(self, paths: Paths, phase: Phase, mark: Any) -> None:
        mark.__exit__(None, None, None)


def label(paths: Paths, phase: Phase) -> str:
    """`layers.0 backward`."""
    return f"{', '.join(paths)} {phase}"


@contextmanager
def quiet() -> Iterator[None]:
    """The profiler tells stderr when it begins and ends, and of memory that is older than itself."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


_FORWARD = "forward of the pass"


def _of_allocator(model: Model, once: Pass) -> Memory:
    with quiet(), profile(profile_memory=True) as seen, visited(model, Ranges()) as end:
        with record_function(_FORWARD):
            loss = once.forward()
        if loss is not None:
            loss.backward()
            end()
    del loss
    events: list[Any] = seen.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    moments = [moment for moment, _ in changes]
    in_use = [0, *accumulate(size for _, size in changes)]
    at = {label(paths, phase): paths for _, paths in parts(model) for phase in ("forward", "backward")}
    nodes: dict[str, int] = {}
    kept = 0
    for e in events:
        if e.name() not in at and e.name() != _FORWARD:
            continue
        first, last = bisect_left(moments, e.start_ns()), bisect_right(moments, e.start_ns() + e.duration_ns())
        for path in at.get(e.name(), ()):
            nodes[path] = max(nodes.get(path, 0), max(in_use[first : last + 1]) - in_use[first])
        if e.name() == _FORWARD:
            kept = in_use[last]
    return Memory(once.held, max(in_use), kept, nodes)


# ------------------------------------------------------------------------------------------------ GPUs
class _Card:
    """A visitor that asks the allocator of the GPU, which knows what is in use without waiting for the device."""

    def __init__(self):
        self.peak = 0
        self.nodes: dict[str, int] = {}

    def look(self) -> int:
        """Bytes in use; a new stretch begins."""
        self.peak = max(self.peak, torch.cuda.max_memory_allocated())
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def enter(self, paths: Paths, phase: Phase) -> int:
        return self.look()

    def leave(self, paths: Paths, phase: Phase, mark: int) -> None:
        most = torch.cuda.max_memory_allocated() - mark
        for path in paths:
            self.nodes[path] = max(self.nodes.get(path, 0), most)
        self.look()


def _of_card(model: Model, once: Pass) -> Memory:
    seen = _Card()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = 0
    with visited(model, seen) as end:
        loss = once.forward()
        kept = torch.cuda.memory_allocated() - before
        if loss is not None:
            loss.backward()
            end()
    seen.look()
    return Memory(once.held, seen.peak - before, kept, seen.nodes)
