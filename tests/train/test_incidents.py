"""A step that must not be taken: who is blamed, what is kept, and that a skipped one leaves no trace."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import config, history, same, weights
from torch import nn

from zoo.errors import ConfigError, ZooError
from zoo.sections import TrainSection
from zoo.train import titan
from zoo.train.incidents import WINDOW, BadStep, Judge
from zoo.train.run import train
from zoo.train.watch import read_incidents

pytestmark = pytest.mark.usefixtures("short_samples")


class BadGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * math.nan


def inject(monkeypatch, module, steps, how):
    """`how(output)` in the place of a module's output in those steps; the states around each of them are returned."""
    states = []
    take = titan._Trainer.train_step

    def state(self):
        model = {k: v.clone() for k, v in [*self.parts[0].state_dict().items(), *self.parts[0].named_buffers()]}
        return model | {k: v.clone() for k, v in self.optimizers.state_dict().items() if torch.is_tensor(v)}

    def train_step(self, batches):
        if self.step not in steps:
            return take(self, batches)
        before = state(self)
        handle = self.parts[0].get_submodule(module).register_forward_hook(lambda m, args, y: how(y))
        try:
            take(self, batches)
        finally:
            handle.remove()
            states.append((before, state(self)))

    monkeypatch.setattr(titan._Trainer, "train_step", train_step)
    return states


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_nan_in_an_output_stops_and_names_the_node(source, tmp_path, monkeypatch, recompute):
    inject(monkeypatch, "layers.1.items.0.block", {4}, lambda y: torch.where(y > y.mean(), y, math.nan))
    out = tmp_path / "run"
    with pytest.raises(ZooError, match=r"training diverged: the loss of step 4 is nan; lower train\.lr") as caught:
        train(config("dense", source, accumulation=2, activation_checkpoint=recompute), out=out, progress=False)
    folder = out / "incident-step-4"
    assert f"(first the output of layers.1.0, attention; saved in {folder})" in str(caught.value)
    (kept,) = read_incidents(out)
    assert kept == json.loads((folder / "incident.json").read_text())
    assert kept["node"] == {"path": "layers.1.0", "block": "attention", "what": "output"} and not kept["skipped"]
    assert [n["path"] for n in kept["nodes"][:3]] == ["tok_embeddings", "layers.0.0", "layers.0.1"]
    assert kept["nodes"][3]["output_rms"] == "nan" and float(kept["nodes"][2]["output_rms"]) > 0
    batch = load_file(folder / "batch.safetensors")
    assert {k: tuple(v.shape) for k, v in batch.items()} == dict.fromkeys(
        ["0.0.input", "0.0.target", "0.1.input", "0.1.target"], (2, 24)
    )
    assert torch.equal(batch["0.0.input"][:, 1:], batch["0.0.target"][:, :-1])
    assert len(history(out)) == 3


def test_nan_in_a_gradient_is_skipped_without_a_trace(source, tmp_path, monkeypatch):
    states = inject(monkeypatch, "layers.0.items.1.block", {4, 5}, BadGradient.apply)
    out = tmp_path / "run"
    result = train(config("hybrid", source, on_nan="skip", steps=6), out=out, progress=False)
    assert result.step == 6 and math.isfinite(result.loss)
    for before, after in states:
        assert same(before, after)
    assert [r["step"] for r in history(out)] == [1, 2, 3, 6]
    incidents = read_incidents(out)
    assert [(i["step"], i["kind"], i["skipped"]) for i in incidents] == [
        (4, "gradient norm", True), (5, "gradient norm", True),
    ]  # fmt: skip
    assert incidents[0]["node"] == {"path": "layers.0.1", "block": "moe", "what": "gradient"}
    assert {"0.0.doc_ids", "0.1.doc_ids"} <= load_file(out / "incident-step-4" / "batch.safetensors").keys()
    monkeypatch.undo()  # the rate is that of the step's number
    untouched = train(config("dense", source, steps=6), out=tmp_path / "other", progress=False)
    assert history(out)[-1]["lr"] == history(untouched.out)[-1]["lr"]


def test_resuming_behind_a_skipped_step_changes_nothing(source, tmp_path, monkeypatch):
    inject(monkeypatch, "layers.0.items.1.block", {3}, BadGradient.apply)
    made = config("dense", source, on_nan="skip", steps=6)
    whole = train(made, out=tmp_path / "whole", progress=False)
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        take = titan._Trainer.train_step

        def fail(self, batches):
            if self.step == 5:
                raise RuntimeError
            take(self, batches)

        patch.setattr(titan._Trainer, "train_step", fail)
        with pytest.raises(RuntimeError):
            train(made, out=out, progress=False)
    train(made, out=out, resume=True, progress=False)
    assert history(out) == history(whole.out) and same(weights(out), weights(whole.out))


def test_too_many_skips_stop(source, tmp_path, monkeypatch):
    inject(monkeypatch, "layers.0.items.1.block", range(3, 10), lambda y: y * math.inf)
    made = config("dense", source, on_nan="skip", max_skips=2)
    with pytest.raises(ZooError, match="training diverged after 2 skipped steps: the loss of step 5 is nan"):
        train(made, out=tmp_path / "run", progress=False)
    assert [i["skipped"] for i in read_incidents(tmp_path / "run")] == [True, True, False]
    # without a folder too
    with pytest.raises(ZooError, match=r"first the output of layers\.0\.1, swiglu\)"):
        train(config("dense", source), progress=False)


def test_a_spike_is_skipped(source, tmp_path, monkeypatch):
    inject(monkeypatch, "norm", {12}, lambda y: y * 1000)
    out = tmp_path / "run"
    train(config("dense", source, steps=13, spike_factor=3), out=out, progress=False)
    assert [r["step"] for r in history(out)] == [*range(1, 12), 13]
    (kept,) = read_incidents(out)
    assert (kept["kind"], kept["node"], kept["skipped"]) == ("spike", None, True)
    assert float(kept["value"]) > 3 * kept["median"]
    assert max(kept["nodes"], key=lambda n: float(n["output_rms"]))["path"] in ("norm", "lm_head")


def test_bad_weights_are_blamed_first(source, monkeypatch):
    take = titan._Trainer.train_step

    def train_step(self, batches):
        if self.step == 2:
            with torch.no_grad():
                self.parts[0].get_submodule("layers.1.items.1.block").up_proj.weight[0, 0] = math.nan
        take(self, batches)

    monkeypatch.setattr(titan._Trainer, "train_step", train_step)
    words = r"first the weights \(layers\.1\.items\.1\.block\.up_proj\.weight\) of layers\.1\.1, swiglu"
    with pytest.raises(ZooError, match=words):
        train(config("dense", source), progress=False)


def test_the_judge_remembers_what_a_resumed_run_needs():
    section = TrainSection(spike_factor=2.0)
    parameter = nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    judge = Judge(section)
    for loss in (1.0, 100.0, *[1.0] * 8):  # too few to judge by: none is a spike
        judge(loss, [parameter])
    with pytest.raises(BadStep) as caught:
        judge(2.1, [parameter])
    assert (caught.value.kind, caught.value.median) == ("spike", 1.0)
    judge(1.9, [parameter])
    again = Judge(section, [5.0] * 100 + list(judge.losses))
    assert len(again.losses) == WINDOW
    judge(None, [parameter])  # a stage of a pipeline that knows no loss
    parameter.grad[1] = math.inf
    with pytest.raises(BadStep) as caught:
        judge(1.0, [parameter])
    assert caught.value.kind == "gradient norm"
    with pytest.raises(ConfigError, match="spike_factor: must be 0"):
        TrainSection.from_mapping({"spike_factor": 0.5})
