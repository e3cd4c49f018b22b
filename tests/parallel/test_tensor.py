"""Tensor parallelism: what two ranks compute with their shares of a block's weights is what one computes with all."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from zoo.conformance.subject import Subject, gradients, tokens
from zoo.contract import set_auxiliary_scale
from zoo.parallel import tensor
from zoo.parallel.tensor import splits
from zoo.registry import list_blocks, load, options

KINDS = ("mixer", "ffn", "memory")
TOLERANCE = 1e-9  # of float64


class Holder(nn.Module):
    """A model of one block."""

    def __init__(self, block):
        super().__init__()
        self.layers = nn.ModuleList([block])


def subjects(kinds=KINDS):
    for kind in kinds:
        for name in list_blocks(kind):
            found = load(name).zoo_registration
            more = [{"num_heads": 4}] if "num_heads" in options(name) else []
            for given in (*found.examples[:2], *(more or [{}])):
                yield Subject(name, found, given)


def difference(got, want):
    return ((got - want).abs().max() / want.abs().max().clamp(min=1e-3)).item()


def compare(names):
    """Of each block on two ranks: the largest difference of the output or a gradient, and where it is."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    worst = {}
    for subject in [s for s in subjects() if s.name in names]:
        x = tokens(2, 24)
        block, split = subject.build().train(), subject.build().train()
        torch.manual_seed(0)
        y, wanted = gradients(block, x)
        tensor.apply(Holder(split), mesh)
        torch.manual_seed(0)
        z, found = gradients(split, x)
        differences = {"y": difference(z, y)}
        for name, g in found.items():
            g = g.full_tensor() if isinstance(g, DTensor) else g
            differences[name] = difference(g, wanted[name])
        where = max(differences, key=differences.get)
        worst[f"{subject.name} {dict(subject.options)}"] = (where, differences[where])
    set_auxiliary_scale(1.0)
    return worst


@pytest.mark.parametrize("name", [name for kind in KINDS for name in list_blocks(kind)])
def test_two_ranks_compute_what_one_does(workers, name):
    for one in workers(2).run(compare, (name,)):
        wrong = {k: v for k, v in one.items() if not v[1] < TOLERANCE}
        assert not wrong


def test_a_block_that_has_a_plan_is_split_by_the_test_above():
    plans = {s.name: s.create(device="meta").parallel_plan().tensor for s in subjects()}
    split = {s.name for s in subjects() if not next(splits(Holder(s.create(device="meta")), 2)).reason}
    assert {name for name, plan in plans.items() if set(plan.values()) - {"replicate"}} <= split
    assert len(split) > len(plans) / 2
