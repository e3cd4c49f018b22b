"""Tensor parallelism: heads, channels and experts of each block over the ranks of a mesh, from the block's own plan.

The stream is the same on all ranks. A block that its plan can split computes with its share of the weights a part of
the increment, and the parts are summed; another block is computed whole by each rank. The embedding and the head hold
a share of the vocabulary each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.nn import functional as F

from zoo.contract import Block, ParallelPlan, one_part
from zoo.parallel import expert
from zoo.parallel.local import LocalParameters, Lying, enter, leave

_WHOLE = Lying(Replicate())


@dataclass(frozen=True)
class Split:
    """What tensor parallelism does to one block: `reason` says why it stays whole."""

    path: str
    block: Block
    plan: ParallelPlan
    reason: str = ""


def blocks_of(module: nn.Module, path: str = "") -> Iterator[tuple[str, Block]]:
    """The outermost blocks of a model, each once."""
    seen: set[int] = set()

    def below(module: nn.Module, path: str) -> Iterator[tuple[str, Block]]:
        if id(module) in seen:
            return
        seen.add(id(module))
        if isinstance(module, Block):
            yield path, module
            return
        for name, child in module.named_children():
            yield from below(child, f"{path}.{name}" if path else name)

    yield from below(module, path)


def splits(model: nn.Module, degree: int) -> Iterator[Split]:
    """How each block would be split over `degree` ranks."""
    for path, block in blocks_of(model):
        plan = block.parallel_plan()
        if all(how == "replicate" for how in plan.tensor.values()):
            yield Split(path, block, plan, plan.reason or "its plan splits no parameter")
        elif plan.units % degree:
            yield Split(path, block, plan, f"its {plan.units} heads, channels or experts are no multiple of {degree}")
        else:
            yield Split(path, block, plan)


def apply(model: Any, mesh: DeviceMesh) -> None:
    """Split `model` (on the meta device) over `mesh` in place. Names of parameters stay."""
    embedding, head = getattr(model, "tok_embeddings", None), getattr(model, "lm_head", None)
    tied = embedding is not None and head is not None and head.weight is embedding.weight
    for unit in units(model):
        lying: dict[str, Lying] = {}
        for split in splits(unit, mesh.size()):
            if not split.reason:
                prefix = f"{split.path}." if split.path else ""
                lying |= {prefix + n: lies(n, split.plan, mesh.size()) for n, _ in split.block.named_parameters()}
                _split(split.block, split.plan, mesh)
        if unit in (embedding, head):
            lying["weight"] = Lying(Shard(0))
            unit.forward = (_lookup if unit is embedding else _logits)(unit, mesh)
        local = LocalParameters(unit, mesh, lambda name, lying=lying: lying.get(name, _WHOLE))
        unit.forward = local.over(unit.forward)
    if tied:
        head.weight = embedding.weight


def units(model: nn.Module) -> list[nn.Module]:
    """The parts of a model that are called one after the other: each layer, and what stands around them."""
    found: list[nn.Module] = []
    for name, child in model.named_children():
        found += [*child.children()] if name == "layers" else [child]
    return list(dict.fromkeys(found))


def lies(name: str, plan: ParallelPlan, degree: int) -> Lying:
    """How a parameter of a split block lies over `degree` ranks, by its name in the block."""
    matches = [key for key in plan.tensor if name == key or name.startswith(f"{key}.")]
    how = plan.tensor[max(matches, key=len)] if matches else "replicate"
    if how == "row" and name.endswith(".bias"):
        how = "once"
    return {
        "row": Lying(Shard(1)),
        "column": Lying(Shard(0)),
        "expert": Lying(Shard(0)),
        "replicate": Lying(Replicate(), Partial()),
        "once": Lying(Replicate(), Partial(), 1 / degree),
    }[how]


def _split(block: Any, plan: ParallelPlan, mesh: DeviceMesh) -> None:
    forward, inside = block.forward, False
    for name, how in plan.tensor.items():
        if how == "expert":
            expert.keep_own(block.get_submodule(name), mesh)

    def run(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        nonlocal inside
        inside = True
        try:
            with one_part(mesh.get_local_rank(), mesh.size()):
                y = forward(enter(x, mesh), *args, **kwargs)
        finally:
            inside = False
        return leave(y, mesh)

    block.forward = run
    if block.shares_keys:
        write_keys = block.write_keys

        def write(x: Tensor, *args: Any, **kwargs: Any) -> None:  # called from outside or by forward
            write_keys(x if inside else enter(x, mesh), *args, **kwargs)

        block.write_keys = write


def _lookup(embedding: nn.Embedding, mesh: DeviceMesh) -> Callable[[Tensor], Tensor]:
    def run(tokens: Tensor) -> Tensor:
        weight = embedding.weight
        # shares of a vocabulary that the degree does not divide are of the size that DTensor cuts, the last less
        first = mesh.get_local_rank() * -(-embedding.num_embeddings // mesh.size())
        at = tokens - first
        here = (at >= 0) & (at < weight.shape[0])
        rows = F.embedding(at.clamp(0, max(weight.shape[0] - 1, 0)), weight)
        return leave(rows * here[..., None], mesh)

    return run


def _logits(head: nn.Linear, mesh: DeviceMesh) -> Callable[[Tensor], Tensor]:
    def run(hidden: Tensor) -> Tensor:
        logits = F.linear(enter(hidden, mesh), head.weight)
        shape = torch.Size((*logits.shape[:-1], head.out_features))
        stride = torch.empty(shape, device="meta").stride()
        last = [Shard(logits.dim() - 1)]  # every rank computes the loss of all logits, so none sums gradients
        shares = DTensor.from_local(logits.contiguous(), mesh, last, run_check=False, shape=shape, stride=stride)
        return shares.redistribute(placements=[Replicate()]).to_local()

    return run
