"""Muon on sharded parameters is Muon on whole ones."""

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

from zoo.train.muon import Muon


def _error(shape, at) -> tuple[float, bool]:
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    whole = nn.Parameter(torch.randn(shape))
    part = nn.Parameter(distribute_tensor(whole.detach().clone(), mesh, [at]))
    a, b = Muon([whole]), Muon([part])
    for _ in range(3):
        whole.grad = torch.randn(shape)
        part.grad = distribute_tensor(whole.grad, mesh, [at])
        a.step()
        b.step()
    return float((part.full_tensor() - whole).abs().max()), part.placements == (at,)


@pytest.mark.parametrize(
    ("shape", "at"),
    [((6, 5), Shard(0)), ((6, 5), Shard(1)), ((6, 5), Replicate()), ((4, 6, 5), Shard(0)), ((4, 6, 5), Shard(2))],
)
def test_sharded(workers, shape, at):
    for error, placed in workers(2).run(_error, shape, at):
        assert error < 1e-6 and placed
