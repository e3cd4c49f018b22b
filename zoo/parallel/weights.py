"""Weights of a sharded model: drawn as if it were whole, and put together again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate


@contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """Inside, the sharded parameters below `module` are whole tensors without values; of those that were written, this
    rank keeps its share. So what a parameter gets does not depend on how it is sharded."""
    places = [(m, n, p) for m in module.modules() for n, p in m._parameters.items() if isinstance(p, DTensor)]
    drawn: dict[int, Tensor] = {}
    for owner, name, p in places:
        if id(p) not in drawn:
            drawn[id(p)] = torch.empty(p.shape, dtype=p.dtype, device=p.device)
        owner._parameters[name] = drawn[id(p)]  # type: ignore[assignment]
    untouched = {key: t._version for key, t in drawn.items()}
    try:
        yield
    finally:
        for owner, name, p in places:
            owner._parameters[name] = p
    for p in {id(p): p for _, _, p in places}.values():
        full = drawn[id(p)]
        if full._version != untouched[id(p)]:
            put(p, full)


def put(p: DTensor, full: Tensor) -> None:
    """Keep of `full`, the same on all ranks, the share of this rank."""
    replicated = [Replicate()] * p.device_mesh.ndim
    share = DTensor.from_local(full, p.device_mesh, replicated, run_check=False).redistribute(placements=p.placements)
    p.to_local().copy_(share.to_local())


def full_state(parts: list[nn.Module], prefix: str = "", keep: bool = True) -> dict[str, Tensor]:
    """Every parameter and persistent buffer whole, on the CPU, by its name without `prefix`. All ranks take part; one
    that does not `keep` them holds one at a time and returns none."""
    found: dict[str, Tensor] = {}
    for part in parts:
        for name, value in part.state_dict().items():
            value = value.full_tensor() if isinstance(value, DTensor) else value
            if keep:
                found[name.removeprefix(prefix)] = value.detach().cpu()
    return found
