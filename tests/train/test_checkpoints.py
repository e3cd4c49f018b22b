"""Checkpoints that are whole: in the background, by several ranks, and what is done about one that is spoilt."""

import re
import shutil

import pytest
from tiny_runs import config, damage, full_disk, history, same, weights

from zoo.errors import ZooError
from zoo.train import titan
from zoo.train.checkpoints import MANIFEST, fault, newest_checkpoint, purge
from zoo.train.run import train

pytestmark = pytest.mark.usefixtures("short_samples")


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    return train(config("dense", source), out=tmp_path_factory.mktemp("runs") / "whole", progress=False)


def names(folder):
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize(
    "how, words",
    [
        ("flipped", r"the content of __0_0\.distcp is not what was written"),
        ("truncated", r"__0_0\.distcp has [\d,]+ bytes instead of [\d,]+"),
        ("vanished", r"__0_0\.distcp is missing"),
    ],
)
def test_a_spoilt_checkpoint_is_passed_over(whole, source, tmp_path, how, words, capfd):
    out = tmp_path / "run"
    shutil.copytree(whole.out, out)
    damage(out / "checkpoint" / "step-10" / "__0_0.distcp", how)
    (out / "checkpoint" / "step-12").mkdir()  # of somebody else
    resumed = train(config("dense", source), out=out, resume=True)
    said = re.sub(r"\s+", " ", capfd.readouterr().err)
    assert "checkpoint passed over: step-12: it has no manifest.json" in said
    assert re.search(f"checkpoint passed over: step-10: {words}", said), said
    assert resumed.step == 10 and history(out) == history(whole.out) and same(weights(out), weights(whole.out))
    assert fault(out / "checkpoint" / "step-10") is None and newest_checkpoint(out) == 10
    assert names(out / "checkpoint") == ["step-10", "step-12", "step-9"]


def test_where_none_is_good_the_run_is_not_begun_anew(whole, source, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole.out, out)
    (out / "checkpoint" / "step-9" / MANIFEST).write_text("{")
    damage(out / "checkpoint" / "step-10" / ".metadata", "flipped")
    words = r"has no checkpoint that can be read \(step-10: the content of \.metadata .*; step-9: manifest\.json cannot"
    with pytest.raises(ZooError, match=words):
        train(config("dense", source), out=out, resume=True, progress=False)
    assert len(history(out)) == 10
    shutil.rmtree(out / "checkpoint")
    assert newest_checkpoint(out) is None


def test_in_the_background_the_same_is_saved(whole, source, tmp_path):
    out = tmp_path / "run"
    made = config("dense", source, checkpoint_async=True)
    train(made, out=out, progress=False)
    assert history(out) == history(whole.out) and names(out / "checkpoint") == ["step-10", "step-9"]
    shutil.rmtree(out / "checkpoint" / "step-10")  # the last one is not written in the background
    train(made, out=out, resume=True, progress=False)
    assert history(out) == history(whole.out) and same(weights(out), weights(whole.out))
    assert names(out / "checkpoint") == ["step-10", "step-9"]


def test_a_full_disk_in_the_background_is_told_and_harms_nothing(whole, source, tmp_path, monkeypatch):
    out = tmp_path / "run"
    made = config("dense", source, checkpoint_async=True)
    take = titan._Trainer.train_step

    def train_step(self, batches):
        if self.step == 6:
            self.checkpointer.maybe_wait_for_saving()
            disk = full_disk(20_000)
            disk.__enter__()
            opened.append(disk)
        take(self, batches)

    opened = []
    monkeypatch.setattr(titan._Trainer, "train_step", train_step)
    try:
        with pytest.raises(ZooError, match=r"step-6: the checkpoint cannot be written: File too large"):
            train(made, out=out, progress=False)
    finally:
        opened[0].__exit__(None, None, None)
    assert names(out / "checkpoint") == ["step-3"] and fault(out / "checkpoint" / "step-3") is None
    monkeypatch.undo()
    train(made, out=out, resume=True, progress=False)
    assert history(out) == history(whole.out)


def test_purge_counts_only_complete_ones(tmp_path):
    for step in (1, 2, 3, 4, 9):
        (tmp_path / f"step-{step}").mkdir()
        if step != 3:
            (tmp_path / f"step-{step}" / MANIFEST).write_text("{}")
    (tmp_path / ".step-5.tmp").mkdir()
    purge(tmp_path / "step-4", 2)  # 3 is half a one, 9 is of a future that was given up
    assert names(tmp_path) == [".step-5.tmp", "step-2", "step-3", "step-4", "step-9"]
    purge(tmp_path / "step-4", 0)
    assert len(names(tmp_path)) == 5
