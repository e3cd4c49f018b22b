"""Time per node, by hooks around every block: warm-up, then medians over passes."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from zoo.architectures.causal_lm import CausalLM
from zoo.architectures.model import Model
from zoo.architectures.storage import build
from zoo.architectures.vision import VisionModel
from zoo.bench.machine import device_name, free_memory, memory_kept
from zoo.errors import ZooError

if TYPE_CHECKING:
    from zoo.cost import CostReport
    from zoo.graph.spec import Graph

FEW, REPEATS, MANY = 3, 5, 25  # passes: 5, up to 25 while time is left, 3 where they are slow
SLOW = 5.0
_PATIENCE = 60.0  # seconds for one pass; slower ones are measured on request only
_FLOPS_PER_SECOND = {"cpu": 2e10, "cuda": 1e13}  # a low guess, to tell seconds from hours


@dataclass(frozen=True)
class Measured:
    """Milliseconds of one pass and of each node in it, medians over `repeats` passes."""

    total: float
    nodes: dict[str, float]
    repeats: int
    threads: int
    device: str

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def too_large(report: CostReport, device: str, wanted: bool) -> str:
    """Why a pass is not measured, or the empty string. ZooError where it was `wanted` and cannot be."""
    weights = 4 * report.params
    need = weights * (2 if report.mode == "train" else 1) + report.activation_bytes + report.state_bytes
    free = free_memory(device)
    if need > 0.8 * free:
        reason = f"a pass needs about {need / 2**30:.3g} GiB, {free / 2**30:.3g} GiB are free"
        if wanted:
            raise ZooError(f"cannot be measured here: {reason}")
        return reason
    seconds = report.flops / _FLOPS_PER_SECOND[device]
    return "" if wanted or seconds < _PATIENCE else f"a pass may take {seconds:.0f} s; --measure insists"


def measure(
    graph: Graph, reports: Sequence[CostReport], reasons: Sequence[str], device: str, advance: Callable[[], Any]
) -> list[Measured | None]:
    """Measure every report that has no reason against it; `advance` is called after each."""
    model = build(dict(graph.document), device=device)
    found: list[Measured | None] = []
    for report, reason in zip(reports, reasons, strict=True):
        found.append(None if reason else measure_model(model, report, device))
        advance()
    return found


def measure_model(
    model: CausalLM | VisionModel,
    report: CostReport,
    device: str,
    enough: float = 1.0,
    now: Callable[[], float] = time.perf_counter,
) -> Measured:
    """Passes of the kind that `report` describes, for `enough` seconds; `now` tells seconds."""
    generator = torch.Generator().manual_seed(0)
    clock = _Clock(device, now)
    if isinstance(model, VisionModel):
        run = _on_images(model, report, device, generator)
    else:
        shape = (report.batch_size, report.context_len + report.seq_len + 1)
        tokens = torch.randint(model.vocab_size, shape, generator=generator).to(device)
        run = _training(model, tokens) if report.mode == "train" else _inference(model, tokens, report)
    passes: list[tuple[float, dict[str, float]]] = []
    warm = False
    with memory_kept(), _timed_nodes(model, report, clock):
        begun = now()
        while not _done(len(passes), now() - begun, enough):
            prepare, work = run()
            prepare()
            clock.spent.clear()
            start = clock.now()
            work()
            if warm:
                passes.append((clock.now() - start, dict(clock.spent)))
            warm = True
    model.zero_grad(set_to_none=True)
    nodes = {p: 1e3 * statistics.median(n.get(p, 0.0) for _, n in passes) for p in passes[0][1]}
    total = 1e3 * statistics.median(t for t, _ in passes)
    return Measured(total, nodes, len(passes), torch.get_num_threads(), device_name(device))


def _done(passes: int, seconds: float, enough: float) -> bool:
    return passes >= FEW and (seconds > SLOW * enough or (passes >= REPEATS and seconds > enough) or passes >= MANY)


Pass = tuple[Callable[[], Any], Callable[[], Any]]  # what is not timed, then what is


def _training(model: CausalLM, tokens: torch.Tensor) -> Callable[[], Pass]:
    def work() -> None:
        logits = model(tokens[:, :-1])
        F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten()).backward()

    model.train()
    return lambda: (lambda: model.zero_grad(set_to_none=True), work)


def _on_images(model: VisionModel, report: CostReport, device: str, generator: torch.Generator) -> Callable[[], Pass]:
    o, train = model.options, report.mode == "train"
    images = torch.randn(report.batch_size, o.channels, o.image_size, o.image_size, generator=generator).to(device)

    def work() -> None:
        with torch.set_grad_enabled(train):
            out = model(images).float()
            if train:
                out.logsumexp(-1).mean().backward()

    model.train(train)
    return lambda: (lambda: model.zero_grad(set_to_none=True), work)


def _inference(model: CausalLM, tokens: torch.Tensor, report: CostReport) -> Callable[[], Pass]:
    model.eval()
    before, after = tokens[:, : report.context_len], tokens[:, report.context_len : -1]
    with torch.no_grad():
        filled = model.init_state(report.batch_size, report.context_len + report.seq_len)
        for part in before.split(1024, dim=1) if report.context_len else ():
            model.hidden(part, filled)
    snapshot = filled.snapshot()

    def work() -> None:
        with torch.no_grad():
            model.head(model.hidden(after, filled)[:, -1])

    return lambda: (lambda: filled.restore(snapshot), work)


class _Clock:
    """Seconds spent per node. A device that works on its own is waited for."""

    def __init__(self, device: str, read: Callable[[], float]):
        self.read = read
        self.wait = torch.cuda.synchronize if device == "cuda" else lambda: None
        self.spent: defaultdict[str, float] = defaultdict(float)
        self.started: list[float] = []

    def now(self) -> float:
        self.wait()
        return self.read()

    def start(self, *unused: Any) -> None:
        self.started.append(self.now())

    def stop(self, paths: Sequence[str]) -> Callable[..., None]:
        def add(*unused: Any) -> None:
            spent = self.now() - self.started.pop()
            for path in paths:  # sites of shared weights bear equal parts
                self.spent[path] += spent / len(paths)

        return add


@contextmanager
def _timed_nodes(model: Model, report: CostReport, clock: _Clock) -> Iterator[None]:
    """Hooks on the block and the norms of every node, forward and backward."""
    sites: dict[int, tuple[nn.Module, list[str]]] = {}
    for leaf in model.leaves(1, 1, 0, "train"):
        for part in (getattr(leaf.module, name, None) for name in ("norm", "block", "out_norm")):
            if isinstance(part, nn.Module) and hasattr(leaf.module, "block"):
                sites.setdefault(id(part), (part, []))[1].append(leaf.path)
    for leaf in model.ends(1, 1, "train"):
        sites[id(leaf.module)] = (leaf.module, [leaf.path])
    handles = []
    for module, paths in sites.values():
        handles.append(module.register_forward_pre_hook(clock.start))
        handles.append(module.register_forward_hook(clock.stop(paths)))
        if report.mode == "train" and module is not model.get_submodule(model.embedding):
            handles.append(module.register_full_backward_pre_hook(clock.start))
            handles.append(module.register_full_backward_hook(clock.stop(paths)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
