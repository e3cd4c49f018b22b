"""On two ranks: one bad step is refused by all, nodes are looked at, a checkpoint is saved in the background."""

import math

import pytest
from jobs import job_of

CONFIG = {
    "dim": 32,
    "vocab_size": 257,
    "tie_embeddings": False,
    "trunk": [{"repeat": 2, "of": [[{"attention": {"num_heads": 2}}, {"swiglu": {}}]]}],
    "data": {"source": "mqar", "num_pairs": 4},
}
TRAIN = {
    "steps": 4, "batch_size": 8, "seq_len": 32, "lr": 1e-3, "eval_every": 0, "health_every": 2,
    "checkpoint_every": 2, "checkpoint_async": True, "on_nan": "skip",
}  # fmt: skip
BAD_STEP, BAD_MODULE = 3, "layers.1.items.0.block"


def watched(layout, folder, accumulation=1):
    """What this rank learns of a run one step of which gives no number."""
    import torch.distributed as dist

    from zoo.train import titan
    from zoo.train.checkpoints import fault, newest_checkpoint

    given = {**CONFIG, "train": {**TRAIN, "accumulation": accumulation}, "parallel": layout}
    take = titan._Trainer.train_step

    def train_step(self, batches):
        held = {n: m for part in self.parts for n, m in part.named_modules()}
        hooks = []
        if self.step == BAD_STEP and BAD_MODULE in held:
            hooks.append(held[BAD_MODULE].register_forward_hook(lambda m, args, y: y * math.nan))
        take(self, batches)
        for hook in hooks:
            hook.remove()

    losses, incidents, health = [], [], []
    titan._Trainer.train_step = train_step
    try:
        titan.fit(
            job_of(
                given,
                folder=folder,
                on_step=lambda record: losses.append((record["step"], record["loss"])),
                on_incident=lambda incident: incidents.append((incident.step, incident.kind, incident.node)),
                on_health=health.append,
            )
        )
    finally:
        titan._Trainer.train_step = take
    if dist.is_initialized():
        dist.barrier()
    saved = [fault(folder / "checkpoint" / f"step-{n}") for n in (2, 4)]
    return losses, incidents, health, saved, newest_checkpoint(folder)


@pytest.fixture(scope="module")
def wanted(tmp_path_factory):
    return {pieces: watched({}, tmp_path_factory.mktemp("one") / "run", pieces) for pieces in (1, 2)}


@pytest.mark.parametrize(
    ("layout", "pieces"), [({"dp_shard": 2}, 1), ({"tp": 2}, 1), ({"pp": 2}, 2)], ids=("dp", "tp", "pp")
)
def test_all_ranks_refuse_the_same_step(workers, wanted, tmp_path, layout, pieces):
    losses, incidents, health, saved, newest = wanted[pieces]
    assert [step for step, _ in losses] == [1, 2, 4] and saved == [None, None] and newest == 4
    assert [i[0] for i in incidents] == [BAD_STEP]
    assert incidents[0][2] == {"path": "layers.1.0", "block": "attention", "what": "output"}
    for rank in workers(2).run(watched, layout, tmp_path / "run", timeout_s=120):
        assert [loss for _, loss in rank[0]] == pytest.approx([loss for _, loss in losses], rel=1e-4)
        assert rank[1] == incidents and rank[3:] == (saved, newest)
        for mine, theirs in zip(rank[2], health, strict=True):
            assert mine["layers"] == pytest.approx(theirs["layers"], rel=1e-3)
            assert {p: n["block"] for p, n in mine["nodes"].items()} == {
                p: n["block"] for p, n in theirs["nodes"].items()
            }
            for path, node in theirs["nodes"].items():
                assert mine["nodes"][path]["grad_norm"] == pytest.approx(node["grad_norm"], rel=1e-3), path
    assert len(list(tmp_path.glob("run/incident-step-3/*"))) == 2
