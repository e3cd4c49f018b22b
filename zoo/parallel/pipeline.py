"""Pipeline parallelism: consecutive layers on consecutive ranks."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, get_schedule_class

from zoo import row
from zoo.contract import positions_from


def stages_per_rank(schedule: str) -> int:
    """How many stages a rank holds under a schedule: looped ones take two."""
    return 2 if issubclass(get_schedule_class(schedule), PipelineScheduleMulti) else 1


def balanced(weights: Sequence[float], count: int) -> list[range]:
    """Cut positions 0 .. len(weights) - 1 into `count` ranges, none empty, whose heaviest is as light as can be."""
    total, best = [0.0], {0: (0.0, [0])}
    for w in weights:
        total.append(total[-1] + w)
    for part in range(count):
        ends = range(part + 1, len(weights) - (count - part - 1) + 1)
        best = {
            end: min((max(worst, total[end] - total[start]), [*cuts, end]) for start, (worst, cuts) in best.items()
                     if start < end)
            for end in ends
        }  # fmt: skip
    cuts = best[len(weights)][1]
    return [range(a, b) for a, b in itertools.pairwise(cuts)]


def layer_weights(model: Any, seq_len: int) -> list[float]:
    """Training FLOPs of each layer; those of the head count to the last one."""
    flops = [float(sum(leaf.cost.flops for leaf in layer.leaves(1, seq_len, 0, "train"))) for layer in model.layers]
    flops[-1] += sum(leaf.cost.flops for leaf in model.ends(1, seq_len, "train"))
    return flops


def keep(model: Any, layers: range, first: bool, last: bool) -> None:
    """Take everything out of `model` that belongs to other stages. Names of what stays do not change."""
    model.is_last = last
    for name in list(model.layers._modules):
        if int(name) not in layers:
            del model.layers._modules[name]
    around = [name for name, _ in model.named_children() if name != "layers"]
    for name in around:
        if not (first if name == model.embedding else last):
            setattr(model, name, None)


def run(model: Any, x: Tensor, doc_ids: Tensor | None = None) -> Tensor:
    """What the layers of this stage make of tokens or of the stream before them."""
    if getattr(model, model.embedding) is not None:
        x = model.begin(x)
    given: dict[str, Tensor] = {}
    with row.using(part := getattr(model, "slice", None)):  # a slice of rows that lie on several ranks
        if doc_ids is not None or part is not None:
            given["positions"] = positions_from(doc_ids, x.shape[0], x.shape[1], x.device)
    if doc_ids is not None:
        given["doc_ids"] = doc_ids
    for layer in model.layers:
        x = layer(x, **given)
    return model.end(x) if model.is_last else x


class InTurn(nn.Module):
    """The stages of a rank, without gradients, one after the other. Every rank of the pipeline calls it alike; it gives
    logits where the last stage lies, and None elsewhere."""

    def __init__(self, parts: Sequence[nn.Module], mesh: DeviceMesh):
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.group, self.rank, self.ranks = mesh.get_group(), mesh.get_local_rank(), mesh.size()

    def forward(self, x: Tensor, doc_ids: Tensor | None = None) -> Tensor | None:
        given = {} if doc_ids is None else {"doc_ids": doc_ids}
        last = self.ranks * len(self.parts) - 1
        for number, part in zip(range(self.rank, last + 1, self.ranks), self.parts, strict=True):
            y = part(self._received(x.device) if number else x, **given)
            if number == last:
                return y
            self._send(y)
        return None

    def _send(self, x: Tensor) -> None:
        to = dist.get_global_rank(self.group, (self.rank + 1) % self.ranks)
        dist.send_object_list([x.shape, x.dtype], to, self.group, x.device)
        dist.send(x.contiguous(), to, self.group)

    def _received(self, device: torch.device) -> Tensor:
        source = dist.get_global_rank(self.group, (self.rank - 1) % self.ranks)
        told: list[Any] = [None, None]
        dist.recv_object_list(told, source, self.group, device)
        x = torch.empty(told[0], dtype=told[1], device=device)
        dist.recv(x, source, self.group)
        return x


def build_schedule(
    parts: Sequence[nn.Module], mesh: DeviceMesh, device: torch.device, name: str, microbatches: int, loss: Callable
) -> Any:
    """A schedule over the stages of this rank; stage s of S lies on rank s mod R."""
    count, rank = mesh.size(), mesh.get_local_rank()
    stages = [
        PipelineStage(part, rank + i * count, count * len(parts), device, group=mesh.get_group())
        for i, part in enumerate(parts)
    ]
    cls: Any = get_schedule_class(name)
    options = {"n_microbatches": microbatches, "loss_fn": loss, "scale_grads": False}
    return stepping(cls(stages if issubclass(cls, PipelineScheduleMulti) else stages[0], **options), stages)


def stepping(schedule: Any, stages: list[PipelineStage]) -> Any:
    """torch before 2.14 takes whole batches in `step`; torchtitan hands over lists of microbatches."""
    if "arg_mbs" in inspect.signature(type(schedule).step).parameters:
        return schedule

    def step(
        *, arg_mbs: Any = None, kwarg_mbs: Any = None, target_mbs: Any = None, losses: Any = None,
        loss_kwargs: Any = None, return_outputs: bool = False,
    ) -> None:  # fmt: skip
        for stage in stages:
            stage.has_backward = schedule._has_backward
            stage.clear_runtime_states()
        schedule._step_microbatches(arg_mbs, kwarg_mbs, target_mbs, losses, return_outputs, loss_kwargs=loss_kwargs)

    schedule.step = step
    return schedule
