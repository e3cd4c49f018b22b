"""FSDP2 and HSDP: one unit per layer, so that a loop or a repeated layer gathers its weights once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_common import ShardPlacementResult
from torch.distributed.fsdp._fully_shard._fsdp_init import _get_mesh_info
from torch.distributed.tensor import Shard

from zoo.parallel.expert import mixtures
from zoo.parallel.tensor import units


def apply(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    root: nn.Module,
    experts: DeviceMesh | None = None,
    reshard: bool = True,
    states: bool = False,
) -> None:
    """Shard the parameters of `model` over `mesh` (one dimension, or replicate x shard) in place. Gradients are summed.

    root: the module around it that is called.
    experts: the mesh of expert networks that are spread over ranks already.
    states: whether `state` is given to the modules while they are trained.
    """
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    placement: Callable[..., Any] | None = None
    if experts is not None:
        spread = {p for m in mixtures(model).values() for p in m.parameters()}
        inner: Any = _get_mesh_info(experts, None)  # as torchtitan does
        outer: Any = _get_mesh_info(mesh, None)

        def place(p: nn.Parameter) -> ShardPlacementResult:
            return ShardPlacementResult(placement=Shard(0), mesh_info=inner if p in spread else outer)

        placement = place

    for group in groups(model):
        again = reshard and not any(unit is getattr(model, "lm_head", None) for unit in group)  # it is needed at once
        fully_shard(
            group if len(group) > 1 else group[0], mesh=mesh, mp_policy=policy, reshard_after_forward=again,
            shard_placement_fn=placement,
        )  # type: ignore[call-overload]  # fmt: skip
    fully_shard(root, mesh=mesh, mp_policy=policy)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            if states:  # FSDP puts new tensors in the place of those in dataclasses, and a state is updated in place
                module.register_forward_pre_hook(_hide_state, prepend=True, with_kwargs=True)
                module.register_forward_pre_hook(_show_state, with_kwargs=True)
            module.set_gradient_divide_factor(1.0)  # the loss is divided by the tokens of all ranks
            if mesh.device_type == "cpu":
                module.set_force_sum_reduction_for_comms(True)  # gloo cannot scale while it sums


def free(root: nn.Module) -> None:
    """Let go of whole weights that a forward pass without a backward one left on each rank."""
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


class _Hidden:
    """A streaming state on its way past FSDP."""

    def __init__(self, state: Any):
        self.state = state


def _hide_state(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, ({**kwargs, "state": _Hidden(kwargs["state"])} if "state" in kwargs else kwargs)


def _show_state(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, ({**kwargs, "state": kwargs["state"].state} if "state" in kwargs else kwargs)


def groups(model: nn.Module) -> list[list[nn.Module]]:
    """Units that hold parameters, those that share one together."""
    groups: list[tuple[list[nn.Module], set[int]]] = []
    for unit in units(model):
        held = {id(p) for p in unit.parameters()}
        if held:
            touching = [g for g in groups if g[1] & held]
            members = [m for g in touching for m in g[0]] + [unit]
            groups = [g for g in groups if g not in touching]
            groups.append((members, held.union(*(g[1] for g in touching))))
    return [members for members, _ in groups]
