"""Every node is looked at now and then; the training does not notice."""

import io

import pytest
import torch
from rich.console import Console
from tiny_runs import config, history, same, weights
from torch import nn

from zoo.blocks.measure import load_metrics
from zoo.train import parallelize
from zoo.train import run as running
from zoo.train.complaints import News, complaints
from zoo.train.curve import read_metrics
from zoo.train.health import outputs_of
from zoo.train.progress import Reporter
from zoo.train.run import train

pytestmark = pytest.mark.usefixtures("short_samples")


def health(out):
    return read_metrics(out / "health.jsonl")


def test_what_is_looked_at(source, tmp_path):
    out = tmp_path / "looked"
    train(config("hybrid", source, steps=4, health_every=2), out=out, progress=False)
    records = health(out)
    assert [r["step"] for r in records] == [2, 4]
    nodes, layers = records[-1]["nodes"], records[-1]["layers"]
    assert list(nodes) == [
        "tok_embeddings", "layers.0.0", "layers.0.1", "layers.1.0", "layers.1.1", "layers.2.body.0.0",
        "layers.2.body.0.1", "layers.2.router", "layers.3", "norm",
    ]  # fmt: skip
    assert list(layers) == ["layers.0", "layers.1", "layers.2", "layers.3"]  # the last stands at two places
    assert all(0.01 < size < 100 for size in layers.values())
    assert {"block", "grad_norm", "load_entropy", "max_load", "idle_experts"} <= nodes["layers.0.1"].keys()
    assert {"share_0", "share_1"} <= nodes["layers.2.router"].keys()
    # all norms together are the one that the step has
    whole = history(out)[-1]["grad_norm"]
    assert sum(n["grad_norm"] ** 2 for n in nodes.values()) ** 0.5 == pytest.approx(whole, rel=1e-5)


def test_the_training_does_not_notice(source, tmp_path):
    made = config("dense", source, activation_checkpoint="full", accumulation=2)
    runs = []
    for every in (0, 3):
        made["train"]["health_every"] = every
        runs.append(train(made, out=tmp_path / str(every), progress=False).out)
    assert history(runs[0]) == history(runs[1]) and same(weights(runs[0]), weights(runs[1]))
    assert health(runs[0]) == [] and [r["step"] for r in health(runs[1])] == [3, 6, 9]
    # a resumed run says the same again
    train(made | {"train": made["train"] | {"steps": 12}}, out=runs[1], resume=True, progress=False)
    assert [r["step"] for r in health(runs[1])] == [3, 6, 9, 12]


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        return torch.tanh(x @ self.weight)


def test_a_compiled_layer_is_measured_from_outside():
    """It is compiled once, whether it is measured or not."""
    torch.manual_seed(0)
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    layers = {"layers.0": Layer(), "layers.1": Layer()}
    layers["layers.0"].compile(backend=backend, fullgraph=True)
    x = torch.randn(3, 4)
    plain = layers["layers.1"](layers["layers.0"](x))
    with outputs_of(layers) as found:
        assert torch.equal(layers["layers.1"](layers["layers.0"](x)), plain)
    layers["layers.1"](layers["layers.0"](x))
    assert len(compiled) == 1 and [len(v) for v in found.values()] == [1, 1]
    assert float(found["layers.1"][0]) == pytest.approx(float(plain.detach().square().mean()))


@pytest.mark.slow
def test_a_compiled_run_is_measured(source, tmp_path, monkeypatch):
    monkeypatch.setattr(parallelize, "COMPILE_BACKEND", "aot_eager")
    out = tmp_path / "run"
    train(config("dense", source, compile=True, steps=4, health_every=2), out=out, progress=False)
    assert [list(r["layers"]) for r in health(out)] == [["layers.0", "layers.1"]] * 2


def line(idle=0.0, grad_norm=1.0, size=1.0):
    nodes = {"layers.0.1": {"block": "moe", "grad_norm": grad_norm, "idle_experts": idle}}
    return {"step": 50, "nodes": nodes, "layers": {"layers.0": size}}


def test_only_what_is_not_well_is_said_and_once(source, monkeypatch):
    assert complaints(line()) == []
    texts_ = [c.text for c in complaints(line(0.25, 0.0, 123456.0))]
    assert texts_ == [
        "layers.0.1 (moe): 25 % of the experts get less than a hundredth of their share of the tokens",
        "layers.0.1 (moe): no gradient reaches its weights",
        "layers.0: its output has an RMS of 123,456",
    ]
    news = News()
    said = [len(news.of(r)) for r in (line(), line(0.25), line(0.5), line(0.5, 0.0), line(), line(0.25))]
    assert said == [0, 1, 0, 1, 0, 1]
    counts = torch.tensor([0, 5000, 40, 5000])
    assert float(load_metrics(counts)["idle_experts"]) == 0.25

    text = io.StringIO()
    monkeypatch.setattr(running, "Reporter", lambda show: Reporter(True, Console(file=text, width=200)))
    made = config("dense", source, steps=2, health_every=1, eval_every=0)
    made["trunk"] = [{"moe": {"num_experts": 8, "top_k": 2, "hidden_dim": 4}}]
    made["train"]["batch_size"], made["train"]["seq_len"] = 1, 2  # two tokens, each with two of eight experts
    made["data"]["heldout_bytes"] = 40
    train(made)
    assert text.getvalue().count("% of the experts get less than") == 1
