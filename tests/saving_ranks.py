"""What several processes do that save one checkpoint, and how one is spoilt."""

import os
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from tiny_runs import full_disk
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from zoo.errors import ZooError
from zoo.train.checkpoints import Save, fault


def damage(path, how):
    """Spoil a file: one bit of it flipped, its last byte gone, or all of it."""
    if how == "flipped":
        with path.open("r+b") as file:
            file.seek(os.path.getsize(path) // 2)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 1]))
    elif how == "truncated":
        os.truncate(path, os.path.getsize(path) - 1)
    else:
        path.unlink()


def state(rank, world):
    """A matrix cut over the ranks, and a number that all have."""
    mesh = init_device_mesh("cpu", (world,))
    return {
        "cut": distribute_tensor(torch.arange(40.0).view(8, 5), mesh, [Shard(0)]),
        "same": distribute_tensor(torch.arange(3.0), mesh, [Replicate()]),
        "step": 7,
    }


def ranks(rank, world, folder):
    """What each of several processes does."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    group = torch.distributed.new_group(backend="gloo")
    save = Save(Path(folder) / "step-1", group, keep=2)
    with save.checked():
        future = dcp.async_save(state(rank, world), checkpoint_id=str(save.temporary), process_group=group)
    save.commit_after(future).result()
    assert fault(Path(folder) / "step-1") is None
    # one of them cannot write
    save = Save(Path(folder) / "step-2", group)
    try:
        with full_disk(100 if rank else 1 << 30), save.checked():
            dcp.save(state(rank, world), checkpoint_id=str(save.temporary), process_group=group)
        raise AssertionError
    except ZooError as error:
        assert "step-2: the checkpoint cannot be written: File too large" in str(error), error
    torch.distributed.barrier()
    if rank:
        damage(Path(folder) / "step-1" / "__1_0.distcp", "flipped")
    torch.distributed.barrier()
    assert "__1_0.distcp is not what" in (fault(Path(folder) / "step-1") or "")
    torch.distributed.barrier()
    if rank:
        damage(Path(folder) / "step-1" / "__1_0.distcp", "flipped")  # the bit is back
    torch.distributed.destroy_process_group()
