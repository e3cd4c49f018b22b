"""A step that must not be taken: its loss or gradient is not finite, or its loss is a spike. What is found out about
it, and the folder it leaves behind.

incident-step-N/incident.json      what happened, the first node to blame, what every node gave
incident-step-N/batch.safetensors  the rows of the step, `rank.piece.name`
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from zoo.sections import TrainSection
from zoo.train.files import new_folder
from zoo.train.sites import Site, modules_of, owner

WINDOW = 50  # losses that a spike is compared with
ENOUGH = 10  # before so many there is no judging

Kind = Literal["loss", "gradient norm", "spike"]


class BadStep(Exception):
    """Raised between the backward pass and the optimizer: this step must not be taken."""

    def __init__(self, kind: Kind, value: float, median: float | None = None):
        super().__init__(f"{kind} {value}")
        self.kind: Kind = kind
        self.value, self.median = value, median


@dataclass(frozen=True)
class Incident:
    """What is known of a bad step. `node` is the first whose weights, output or gradient is not finite."""

    step: int
    kind: Kind
    value: str  # JSON has no nan
    median: float | None
    skipped: bool
    node: dict[str, str] | None  # path, block, what
    folder: str | None

    def __str__(self) -> str:
        what = f"the {self.kind} of step {self.step} is {self.value}"
        if self.kind == "spike":
            what = f"the loss of step {self.step} is {self.value}, the median before it {self.median:.4g}"
        return what

    @property
    def where(self) -> str:
        """The node and the folder, in brackets; empty where neither is known."""
        parts = []
        if self.node:
            parts.append(f"first the {self.node['what']} of {self.node['path']}, {self.node['block']}")
        if self.folder:
            parts.append(f"saved in {self.folder}")
        return f" ({'; '.join(parts)})" if parts else ""


class Judge:
    """Says after each backward pass whether the step may be taken; all ranks get the same answer.

    losses: those of the steps before, so that a resumed run judges as one that was never stopped.
    """

    def __init__(self, train: TrainSection, losses: Iterable[float] = ()):
        self.factor = train.spike_factor
        self.losses = deque(losses, maxlen=WINDOW)

    def __call__(self, loss: float | None, parameters: Iterable[nn.Parameter]) -> None:
        """Raise BadStep, or keep the loss. None: another rank knows it."""
        gradient = float(get_total_norm([g for p in parameters if (g := local(p.grad)) is not None]))
        median = statistics.median(self.losses) if len(self.losses) >= ENOUGH else None
        spiked = bool(
            self.factor and median is not None and loss is not None and median > 0 and loss > self.factor * median
        )
        flags = [loss is not None and not math.isfinite(loss), not math.isfinite(gradient), spiked]
        for kind, raised in zip(("loss", "gradient norm", "spike"), _anywhere(flags), strict=True):
            if raised:
                raise BadStep(kind, gradient if kind == "gradient norm" else _told(loss), median)
        if loss is not None:
            self.losses.append(loss)


def _told(loss: float | None) -> float:
    return math.nan if loss is None else loss


def _anywhere(flags: Sequence[bool]) -> list[bool]:
    """Which of them are set on any rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return list(flags)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    found = torch.tensor(flags, dtype=torch.int32, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return [bool(f) for f in found.tolist()]


def of_all_ranks(mine: Any) -> list[Any]:
    """What each rank has, on each."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [mine]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return found


def local(tensor: Any) -> Tensor | None:
    """This rank's part of a tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def buffers_of(parts: Iterable[nn.Module]) -> Callable[[], None]:
    """Remember the counters and biases of the parts of a model; the function that is returned puts them back."""
    before = [(b, b.clone()) for part in parts for b in part.buffers()]

    @torch.no_grad()
    def restore() -> None:
        for buffer, value in before:
            buffer.copy_(value)

    return restore


# ------------------------------------------------------------------------------------- who was it
def find(
    sites: Sequence[Site], parts: Sequence[nn.Module], again: Callable[[], None]
) -> tuple[dict[str, str] | None, list[dict]]:
    """Run a step's forward and backward pass `again` and look at every node: the first to blame, and all of them.

    Weights come first, then outputs in the order of the forward pass, then gradients in that of the backward pass: the
    node which was given a finite gradient and gave, to its input or its weights, one that is not.
    """
    held = modules_of(sites, parts)
    weights = [named for part in parts for named in part.named_parameters()]
    wrong = next((name for name, p in weights if not _finite(p)), None)
    if _anywhere([wrong is not None])[0]:  # where a rank stops here the others must not wait for it below
        site = wrong and (owner(wrong, sites) or Site(wrong, "of no node alone", wrong))
        return _blamed(site, f"weights ({wrong})") if site else None, []
    seen: dict[Site, _Seen] = {}
    clock = itertools.count()
    handles: list[Any] = []
    for site, module in held.items():
        seen[site] = _Seen(site, clock)
        handles.append(module.register_forward_pre_hook(seen[site].enter, with_kwargs=True))
        handles.append(module.register_forward_hook(seen[site].leave))
    restore = buffers_of(parts)
    try:
        for _, p in weights:
            p.grad = None
        with torch.compiler.set_stance("force_eager"):  # a compiled layer would call no new hook
            again()
        for name, p in weights:
            if p.grad is not None and not _finite(p.grad) and (site := owner(name, sites)) in seen:
                seen[site].gave = False  # type: ignore[index]
    finally:
        restore()
        for handle in handles:
            handle.remove()
    nodes = [s.told() for s in seen.values()]
    if spoilt := [s for s in seen.values() if s.spoilt is not None]:
        return _blamed(min(spoilt, key=lambda s: s.spoilt or 0).site, "output"), nodes
    if gave := [s for s in seen.values() if s.got and not s.gave]:
        return _blamed(max(gave, key=lambda s: s.started).site, "gradient"), nodes
    return None, nodes


def _finite(tensor: Tensor) -> bool:
    part = local(tensor)
    return part is None or not part.is_floating_point() or bool(part.detach().isfinite().all())


def _blamed(site: Site | None, what: str) -> dict[str, str] | None:
    return None if site is None else {"path": site.path, "block": site.block, "what": what}


class _Seen:
    """What passed through one node. `got`, `gave`: whether the gradients of its output, and of its input and weights,
    were finite; `spoilt`: when its output first was not."""

    def __init__(self, site: Site, clock: Iterator[int]):
        self.site, self.clock = site, clock
        self.started = -1
        self.spoilt: int | None = None
        self.got = self.gave = True
        self.rms: float | None = None

    def enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if torch._C._current_graph_task_id() != -1:  # recomputed in a backward pass
            return
        self.started = next(self.clock)
        if args and isinstance(args[0], Tensor) and args[0].requires_grad:
            args[0].register_hook(self._gives)

    def leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        if torch._C._current_graph_task_id() != -1 or not isinstance(output, Tensor):
            return
        self.rms = rms(output)
        if self.spoilt is None and not math.isfinite(self.rms) and not _finite(output):
            self.spoilt = next(self.clock)
        if output.requires_grad:
            output.register_hook(self._gets)

    def _gives(self, gradient: Tensor) -> None:
        self.gave = self.gave and _finite(gradient)

    def _gets(self, gradient: Tensor) -> None:
        self.got = self.got and _finite(gradient)

    def told(self) -> dict[str, Any]:
        return {
            "path": self.site.path,
            "block": self.site.block,
            "output_rms": None if self.rms is None else f"{self.rms:.4g}",
            "gradient_of_output_finite": self.got,
            "gradient_given_finite": self.gave,
        }


def rms(tensor: Tensor) -> float:
    """Root mean square."""
    part = local(tensor.detach())
    return float(part.float().square().mean().sqrt()) if part is not None and part.numel() else 0.0


# ---------------------------------------------------------------------------------------- keeping
def keep(
    folder: Path | None,
    bad: BadStep,
    step: int,
    skipped: bool,
    node: dict[str, str] | None,
    nodes: list[dict],
    pieces: Sequence[tuple[Any, Any, Any]],
) -> Incident:
    """Write `incident-step-N` with what all ranks found; the same incident is returned on each."""
    mine = {
        f"{i}.{name}": tensor.detach().cpu().clone()
        for i, (inputs, labels, _) in enumerate(pieces)
        for name, tensor in _tensors(inputs, labels)
    }
    ranks = of_all_ranks((node, nodes, mine))
    blamed = next((n for n, _, _ in ranks if n), None)
    path = folder / f"incident-step-{step}" if folder else None
    value = f"{bad.value:.4g}"
    incident = Incident(step, bad.kind, value, bad.median, skipped, blamed, str(path) if path else None)
    if path and (not dist.is_initialized() or dist.get_rank() == 0):
        with new_folder(path) as temporary:
            document = asdict(incident) | {"nodes": [n for _, found, _ in ranks for n in found]}
            (temporary / "incident.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
            rows = {f"{rank}.{name}": t for rank, (_, _, batch) in enumerate(ranks) for name, t in batch.items()}
            save_file(rows, temporary / "batch.safetensors")
    return incident


def _tensors(inputs: Any, labels: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(inputs, list):  # the micro-batches of a pipeline
        for i, (one, its) in enumerate(zip(inputs, labels, strict=True)):
            for name, tensor in _tensors(one, its):
                yield f"{i}.{name}", tensor
        return
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            yield name, value
    yield "target", labels
