"""Modules that compute on plain tensors while their parameters are sharded DTensors.

Kernels, custom operators and C cores know nothing of DTensor. So parameters are DTensors, for FSDP, optimizers, norm
clipping and checkpoints, and each call of a unit sees the part of them that lies on this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, distribute_tensor

_REPLICATED = Replicate()


@dataclass(frozen=True)
class Lying:
    """How a parameter lies on a mesh. `gradient` says what a rank computes of the gradient of a replicated one: all of
    it (Replicate), or a part that is to be summed (Partial). Ranks see `scale` times the parameter."""

    placement: Placement
    gradient: Placement = _REPLICATED
    scale: float = 1.0


class LocalParameters:
    """Parameters below `unit` as DTensors on the one-dimensional `mesh`, and as plain tensors of this rank while
    the unit computes."""

    def __init__(self, unit: nn.Module, mesh: DeviceMesh, lying: Callable[[str], Lying]):
        made: dict[int, nn.Parameter] = {}
        self.places: list[tuple[nn.Module, str, Lying]] = []
        for path, owner in unit.named_modules():
            for name, p in list(owner.named_parameters(recurse=False)):
                how = lying(f"{path}.{name}" if path else name)
                if not isinstance(p, DTensor):  # a unit may stand in several places
                    if id(p) not in made:
                        made[id(p)] = nn.Parameter(distribute_tensor(p, mesh, [how.placement]), p.requires_grad)
                    owner.register_parameter(name, made[id(p)])
                if owner._parameters[name].device_mesh.mesh_dim_names == mesh.mesh_dim_names:  # type: ignore
                    self.places.append((owner, name, how))

    @contextmanager
    def __call__(self) -> Iterator[None]:
        # owners and names, not tensors: FSDP puts others in their place at each call
        saved = [(owner, name, owner._parameters[name]) for owner, name, _ in self.places]
        try:
            for owner, name, how in self.places:
                p: Any = owner._parameters[name]
                local = p.to_local(grad_placements=[how.gradient] if how.placement == Replicate() else None)
                owner._parameters[name] = local if how.scale == 1 else local * how.scale
            yield
        finally:
            for owner, name, p in saved:
                owner._parameters[name] = p

    def over(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` with plain parameters."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with self():
                return function(*args, **kwargs)

        return run


def enter(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """x, the same on all ranks, into a region where each computes a part: its gradients are summed."""
    return DTensor.from_local(x, mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])


def leave(y: Tensor, mesh: DeviceMesh) -> Tensor:
    """The sum of the parts y of all ranks, on all ranks."""
    parts = DTensor.from_local(y, mesh, [Partial()], run_check=False)
    return parts.redistribute(placements=[Replicate()]).to_local()
