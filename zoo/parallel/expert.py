"""Expert parallelism: each rank holds some experts of a mixture, and tokens go to where their experts are."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

from zoo.parallel.local import LocalParameters, Lying


def keep_own(experts: Any, mesh: DeviceMesh) -> None:
    """Every rank has all tokens: `experts` computes those of its own experts, a part of a sum."""
    plain, own, first = experts.forward, _own(experts, mesh), mesh.get_local_rank() * _own(experts, mesh)

    def run(x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        here = (indices >= first) & (indices < first + own)
        token, place = here.nonzero(as_tuple=True)
        y = _assigned(plain, x.index_select(0, token), indices[token, place] - first)
        y = y * weights[token, place, None]
        return y.new_zeros(x.shape).index_add(0, token, y).to(x.dtype)

    experts.num_experts, experts.forward = own, run


def exchange(experts: Any, mesh: DeviceMesh) -> None:
    """Ranks have tokens of their own: an all-to-all brings each to its experts, another one brings the results back."""
    plain, own = experts.forward, _own(experts, mesh)
    group, ranks = mesh.get_group(), mesh.size()

    def run(x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        k = indices.shape[1]
        order = indices.flatten().argsort(stable=True)  # by expert, so by rank
        ids = indices.flatten()[order]
        sent = torch.bincount(ids // own, minlength=ranks)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=group)
        to, of = sent.tolist(), received.tolist()
        there = torch.empty(sum(of), dtype=ids.dtype, device=ids.device)
        dist.all_to_all_single(there, ids, of, to, group=group)
        rows = all_to_all_single_autograd(x.index_select(0, order // k), of, to, group)
        y = _assigned(plain, rows, there % own)
        back = all_to_all_single_autograd(y.contiguous(), to, of, group)
        y = torch.as_tensor(back).index_select(0, order.argsort()).view(*indices.shape, -1)
        return (y * weights[..., None]).sum(1).to(x.dtype)

    local = LocalParameters(experts, mesh, lambda name: Lying(Shard(0)))
    experts.num_experts, experts.forward = own, local.over(run)


def _own(experts: Any, mesh: DeviceMesh) -> int:
    return experts.num_experts // mesh.size()


def _assigned(plain: Any, rows: Tensor, ids: Tensor) -> Tensor:
    """Row n through its one expert ids[n]."""
    one = rows.new_ones(len(ids), 1)
    if not len(ids):  # weights take part in every step, or ranks would wait for each other's gradients
        zeros = rows.new_zeros(1, rows.shape[1])
        return plain(zeros, ids.new_zeros(1, 1), one.new_zeros(1, 1))[:0]
    return plain(rows, ids[:, None], one)


def mixtures(model: nn.Module) -> dict[str, nn.Module]:
    """The expert networks of a model that can be spread over ranks, by path."""
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        plan = getattr(module, "parallel_plan", None)
        for name, how in plan().tensor.items() if plan else ():
            if how == "expert":
                found[f"{path}.{name}"] = module.get_submodule(name)
    return found
