import os
import signal
import subprocess
import sys

import pytest
import tiny_runs
from tiny_runs import config, full_disk, history, same, texts, weights

from zoo.errors import DataError, ZooError
from zoo.train import curve
from zoo.train.curve import read_metrics
from zoo.train.run import train

pytestmark = pytest.mark.usefixtures("short_samples")


@pytest.fixture(scope="module")
def killed(source, tmp_path_factory):
    """A run in a process of its own, which kills itself in step 8, and its folder."""
    out = tmp_path_factory.mktemp("killed") / "run"
    command = [sys.executable, tiny_runs.__file__, "hybrid", str(source), str(out), "8"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        yield process, out


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory, killed):
    """Uninterrupted runs, while the other process is on its way."""
    folder = tmp_path_factory.mktemp("runs")
    return {name: train(config(name, source), out=folder / name, progress=False) for name in ("dense", "hybrid")}


def test_killed_and_resumed_is_bit_identical(whole, source, killed):
    process, out = killed
    said = process.communicate()[1]
    assert process.returncode == -signal.SIGKILL, said
    assert len(read_metrics(out / "metrics.jsonl")) == 8 and not (out / "model").exists()
    # as if it had been killed while it saved: neither folder may be taken for a checkpoint
    (out / "checkpoint" / ".step-9.tmp").mkdir()
    (out / "checkpoint" / "step-12").mkdir()
    resumed = train(config("hybrid", source), out=out, resume=True, progress=False)
    assert resumed.step == 10
    assert history(out) == history(whole["hybrid"].out)
    assert same(weights(out), weights(whole["hybrid"].out))
    assert resumed.evaluation == whole["hybrid"].evaluation
    assert not list((out / "checkpoint").glob(".*"))


def test_a_finished_run_goes_on(source, tmp_path):
    out = tmp_path / "run"
    flat = {"schedule": "wsd", "decay_fraction": 0.01, "warmup_steps": 0}
    long = train(config("dense", source, **flat, steps=7), progress=False, out=tmp_path / "long")
    train(config("dense", source, **flat), out=out, steps=5, progress=False)
    more = train(config("dense", source, **flat), out=out, steps=7, resume=True, progress=False)
    assert more.loss == long.loss and same(weights(out), weights(tmp_path / "long"))
    assert [r["step"] for r in history(out)] == list(range(1, 8))
    # nothing is left to do: the results are the same
    again = train(config("dense", source, **flat, steps=7), out=out, resume=True, progress=False)
    assert (again.step, again.loss, again.evaluation) == (7, more.loss, more.evaluation)


def test_a_changed_schedule_applies_from_the_first_resumed_step(source, tmp_path):
    out = tmp_path / "run"
    train(
        config("dense", source, warmup_steps=0, schedule="wsd", decay_fraction=0.01, lr=0.01, steps=3),
        out=out,
        progress=False,
    )
    train(config("dense", source, warmup_steps=0, schedule="wsd", decay_fraction=0.01, lr=0.001, steps=5), out=out,
          resume=True, progress=False)  # fmt: skip
    assert [r["lr"] for r in history(out)] == [0.01, 0.01, 0.01, 0.001, 0.001]


def test_interrupted_run_saves_and_goes_on(whole, source, tmp_path, monkeypatch):
    out = tmp_path / "run"
    add = curve.MetricsFile.add

    def interrupt(self, record):
        add(self, record)
        if record["step"] == 4:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(curve.MetricsFile, "add", interrupt)
    handler = signal.getsignal(signal.SIGINT)
    result = train(config("dense", source), out=out, progress=False)
    assert signal.getsignal(signal.SIGINT) is handler
    assert (result.step, result.interrupted, result.evaluation, result.model) == (4, True, None, None)
    assert (out / "checkpoint" / "step-4").is_dir() and (out / "loss.png").exists() and not (out / "model").exists()
    monkeypatch.setattr(curve.MetricsFile, "add", add)
    train(config("dense", source), out=out, resume=True, progress=False)
    assert history(out) == history(whole["dense"].out)


def test_full_disk_is_one_line_and_the_run_can_be_resumed(source, tmp_path, whole):
    out = tmp_path / "run"
    with full_disk(20_000), pytest.raises(ZooError, match=r"step-3: the checkpoint cannot be written: ") as caught:
        train(config("dense", source), out=out, progress=False)
    assert "\n" not in str(caught.value)
    assert not list((out / "checkpoint").iterdir())
    train(config("dense", source), out=out, resume=True, progress=False)
    assert history(out) == history(whole["dense"].out)


def test_changed_data_cannot_be_resumed(tmp_path):
    folder = texts(tmp_path / "texts")
    train(config("dense", folder), out=tmp_path / "run", steps=1, progress=False)
    (folder / "3.txt").write_text("another text")
    with pytest.raises(DataError, match="the data are not those"):
        train(config("dense", folder), out=tmp_path / "run", resume=True, progress=False)
