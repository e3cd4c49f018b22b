"""Several ranks write one checkpoint; one of them fails, one file is spoilt, one process reads it."""

import json

import torch
import torch.distributed.checkpoint as dcp
from tiny_runs import damage, full_disk
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from zoo.errors import ZooError
from zoo.train.checkpoints import MANIFEST, Save, fault


def state():
    """A matrix cut over the ranks, one that all have, and a number."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    return {
        "cut": distribute_tensor(torch.arange(40.0).view(8, 5), mesh, [Shard(0)]),
        "same": distribute_tensor(torch.arange(3.0), mesh, [Replicate()]),
        "step": 7,
    }


def save_and_spoil(folder):
    rank, group = torch.distributed.get_rank(), torch.distributed.new_group(backend="gloo")
    save = Save(folder / "step-1", group, keep=2)
    with save.checked():
        future = dcp.async_save(state(), checkpoint_id=str(save.temporary), process_group=group)
    save.commit_after(future).result()
    faults = [fault(folder / "step-1")]
    save = Save(folder / "step-2", group)
    try:
        with full_disk(100 if rank else 1 << 30), save.checked():  # one of them cannot write
            dcp.save(state(), checkpoint_id=str(save.temporary), process_group=group)
    except ZooError as error:
        faults.append(str(error))
    for _ in range(2):  # a bit is flipped, and flipped back
        torch.distributed.barrier()
        if rank:
            damage(folder / "step-1" / "__1_0.distcp", "flipped")
        torch.distributed.barrier()
        faults.append(fault(folder / "step-1"))
    return faults


def test_several_ranks_write_one_and_one_process_reads_it(workers, tmp_path):
    told = workers(2).run(save_and_spoil, tmp_path)
    full = f"{tmp_path}/step-2: the checkpoint cannot be written: File too large"
    assert told == [[None, full, "the content of __1_0.distcp is not what was written", None]] * 2
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]
    files = json.loads((tmp_path / "step-1" / MANIFEST).read_text())["files"]
    assert set(files) == {".metadata", "__0_0.distcp", "__1_0.distcp"}
    found = {"cut": torch.zeros(8, 5), "same": torch.zeros(3), "step": 0}
    dcp.load(found, checkpoint_id=str(tmp_path / "step-1"), no_dist=True)
    assert torch.equal(found["cut"], torch.arange(40.0).view(8, 5)) and found["step"] == 7
