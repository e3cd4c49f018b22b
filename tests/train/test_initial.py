"""Weights of one run begin another graph, where they fit."""

import io
import json

import pytest
import torch
from rich.console import Console
from tiny_runs import config, history, weights

import zoo
from zoo.errors import ConfigError
from zoo.train import run as running
from zoo.train.initial import initial
from zoo.train.progress import Reporter
from zoo.train.run import train

pytestmark = pytest.mark.usefixtures("short_samples")


@pytest.fixture(scope="module")
def first(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "first"
    return train(config("dense", source, steps=4, eval_every=0), out=out, progress=False)


def test_the_same_graph_goes_on_from_the_weights(first, source, tmp_path):
    out = tmp_path / "run"
    made = config("dense", source, steps=1, lr=1e-12, init_from=str(first.out), weight_decay=0.0, eval_every=0)
    train(made, out=out, progress=False)
    for name, tensor in weights(first.out).items():
        assert torch.allclose(tensor, weights(out)[name], atol=1e-9), name
    said = json.loads((out / "init.json").read_text())
    assert said["kept"].keys() == weights(first.out).keys()
    assert said["new"] == said["dropped"] == said["shape differs"] == {}
    # a resumed run goes on from its own weights, and needs the others no more
    gone = first.out / "model"
    gone.rename(tmp_path / "elsewhere")
    try:
        more = train(made, out=out, steps=2, resume=True, progress=False)
    finally:
        (tmp_path / "elsewhere").rename(gone)
    assert more.step == 2 and len(history(out)) == 2


def test_another_graph_takes_what_fits_and_says_so(first, source, tmp_path, monkeypatch):
    made = config("dense", source, steps=1, init_from=str(first.out / "model"), eval_every=0)
    made["trunk"] = [{"repeat": 3, "of": [[{"attention": {"num_heads": 2}}, {"swiglu": {"hidden_dim": 32}}]]}]
    made["trunk"][0]["at"] = {1: [{"gla": {"num_heads": 2}}]}
    text = io.StringIO()
    monkeypatch.setattr(running, "Reporter", lambda show: Reporter(True, Console(file=text, width=200)))
    train(made, out=tmp_path / "run")
    said = json.loads((tmp_path / "run" / "init.json").read_text())
    assert {"tok_embeddings.weight", "layers.0.items.0.block.q_proj.weight", "norm.weight"} <= said["kept"].keys()
    assert said["shape differs"]["layers.0.items.1.block.up_proj.weight"] == {"here": [32, 16], "there": [24, 16]}
    assert "layers.2.items.0.block.q_proj.weight" in said["new"]
    assert "layers.1.items.1.block.up_proj.weight" in said["dropped"]
    lines = text.getvalue().splitlines()
    assert any(f"tensors begin as in {first.out}/model/model.safetensors" in line for line in lines)
    row = next(line for line in lines if line.startswith("layers.*.items.*.block.up_proj.weight") and "differs" in line)
    assert row.split() == ["layers.*.items.*.block.up_proj.weight", "1", "32x16", "24x16", "shape", "differs"]


def test_what_is_kept_is_exact_and_the_rest_is_as_drawn(first):
    made = zoo.build({"dim": 16, "vocab_size": 257, "trunk": [{"attention": {"num_heads": 2}}, {"rwkv7": {}}]}, seed=5)
    drawn = {k: v.clone() for k, v in made.state_dict().items()}
    given = weights(first.out)
    plan = initial(str(first.out), made)
    plan.give(made)
    how = {line.name: line.how for line in plan.lines}
    assert how["tok_embeddings.weight"] == "kept" and "new" in how.values()
    for name, tensor in made.state_dict().items():
        wanted = given[name] if how.get(name) == "kept" else drawn[name]
        assert name == "lm_head.weight" or torch.equal(tensor, wanted), name
    assert made.lm_head.weight is made.tok_embeddings.weight


def test_what_cannot_begin_anything(first, source, tmp_path):
    with pytest.raises(ConfigError, match=r"train\.init_from: .* has no model\.safetensors"):
        train(config("dense", source, init_from=str(tmp_path)), progress=False)
    (tmp_path / "model.safetensors").write_bytes(b"no")
    with pytest.raises(ConfigError, match="damaged or no safetensors"):
        train(config("dense", source, init_from=str(tmp_path)), progress=False)
    small = {"dim": 8, "vocab_size": 300, "trunk": [{"swiglu": {"hidden_dim": 8}}]}
    with pytest.raises(ConfigError, match=r"no weight of .* fits this model in name and shape"):
        initial(str(first.out), zoo.build(small, device="meta"))
