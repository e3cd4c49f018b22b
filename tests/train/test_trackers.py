"""TensorBoard and W&B by a switch; the packages are stood in for, so that the tests need neither."""

import importlib.machinery
import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
from tiny_runs import config, texts

from zoo.errors import ConfigError, ZooError
from zoo.train import prepare, trackers
from zoo.train.curve import read_metrics
from zoo.train.run import train


class Writer:
    made = []

    def __init__(self, *args, **options):
        self.options, self.told, self.closed = options | {"args": args}, [], False
        Writer.made.append(self)

    def add_scalar(self, name, value, step):
        self.told.append((step, name, value))

    def log(self, values, step):
        self.told += [(step, name, value) for name, value in values.items()]

    def close(self):
        self.closed = True

    finish = close


@pytest.fixture
def packages(monkeypatch):
    """Both packages, as far as they are used."""
    Writer.made = []
    monkeypatch.setattr(prepare, "SAMPLE_TOKENS", 8)
    for name, content in (
        ("tensorboard", {}),
        ("torch.utils.tensorboard", {"SummaryWriter": Writer}),
        ("wandb", {"init": Writer, "Settings": lambda **options: options}),
    ):
        module = ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, origin="here")
        for key, value in content.items():
            setattr(module, key, value)
        monkeypatch.setitem(sys.modules, name, module)


def test_every_number_is_told_to_both(packages, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(trackers, "_logged_in", lambda host: False)
    out = tmp_path / "run"
    made = config("dense", texts(tmp_path / "texts"), steps=4, health_every=2, tensorboard=True, wandb="zoo")
    train(made, out=out, progress=False)
    board, online = Writer.made
    assert board.closed and online.closed and board.told == online.told
    records = read_metrics(out / "metrics.jsonl")
    told = {(step, name): value for step, name, value in board.told}
    for record in records:
        for key in ("loss", "lr", "grad_norm", "tokens_per_second", "memory"):
            assert told[record["step"], key] == record[key]
    assert told[4, "heldout_loss"] == records[3]["heldout_loss"]
    health = read_metrics(out / "health.jsonl")
    assert told[2, "health/layers/layers.1"] == health[0]["layers"]["layers.1"]
    assert told[4, "health/nodes/layers.0.1/grad_norm"] == health[1]["nodes"]["layers.0.1"]["grad_norm"]
    assert board.options == {"args": (str(out / "tensorboard"),), "purge_step": None}
    assert (online.options["mode"], online.options["project"]) == ("offline", "zoo")
    # a resumed run is the same one, and does not show what it does again twice
    train(made, out=out, steps=6, resume=True, progress=False)
    board, again = Writer.made[2:]
    assert again.options["id"] == online.options["id"] == (out / "wandb.id").read_text()
    assert board.options["purge_step"] == 5 and min(step for step, _, _ in board.told) == 5
    json.dumps(again.options["config"])


def test_what_is_missing_is_said_before_training(tmp_path, monkeypatch):
    made = config("dense", tmp_path / "nothing is read", tensorboard=True)
    with pytest.raises(ConfigError, match=r"train\.tensorboard: needs a run folder"):
        train(made)
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    words = r"train\.tensorboard needs the package tensorboard: pip install 'block-zoo\[watch\]'"
    with pytest.raises(ZooError, match=words):
        train(made, out=tmp_path / "run")
    # a folder of that name in the working directory is no package
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: SimpleNamespace(origin=None))
    with pytest.raises(ZooError, match="needs the package wandb"):
        train(config("dense", tmp_path, wandb="zoo"), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_online_only_for_who_is_logged_in_and_reaches_the_server(monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "x")
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example:8080")
    asked = []
    for reached, mode in ((True, "online"), (False, "offline")):
        monkeypatch.setattr(trackers, "_reached", lambda host, reached=reached: asked.append(host) or reached)
        assert trackers._mode() == mode
    assert asked == ["wandb.example"] * 2
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert trackers._mode() is None
