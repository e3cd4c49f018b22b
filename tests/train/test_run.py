import gc
import json
import logging
import math
import os
from pathlib import Path

import pytest
import torch
from tiny_runs import config, history, weights

import zoo
from zoo import contract
from zoo.errors import ConfigError, ZooError
from zoo.train import parallelize
from zoo.train.folder import free_folder, tokenizer_of
from zoo.train.run import train

pytestmark = pytest.mark.usefixtures("short_samples")


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return {name: train(config(name, source), out=folder / name, progress=False) for name in ("dense", "hybrid")}


@pytest.mark.parametrize("name", ["dense", "hybrid"])
def test_run_folder(whole, name):
    result = whole[name]
    assert (result.step, result.steps, result.interrupted) == (10, 10, False)
    out = result.out
    assert sorted(p.name for p in out.iterdir()) == [
        "checkpoint", "config.yaml", "environment.json", "evaluation.json", "health.jsonl", "loss.png",
        "metrics.jsonl", "model", "sample.txt",
    ]  # fmt: skip
    assert sorted(p.name for p in (out / "checkpoint").iterdir()) == ["step-10", "step-9"]
    records = history(out)
    assert [r["step"] for r in records] == list(range(1, 11))
    assert all(math.isfinite(r["loss"]) and r["grad_norm"] > 0 for r in records)
    assert [r["step"] for r in records if "heldout_loss" in r] == [4, 8, 10]
    assert [r["lr"] for r in records[:2]] == [0.01, 0.02] and 0.002 <= records[-1]["lr"] < 0.004
    assert records[-1]["tokens"] == 10 * 4 * 24
    assert records[-1]["loss"] < records[0]["loss"]
    evaluation = json.loads((out / "evaluation.json").read_text())
    assert evaluation == result.evaluation and evaluation["heldout_bytes"] == 500
    assert json.loads((out / "environment.json").read_text())["data"]["train_documents"] > 20
    # what was saved is what was trained, and the run folder's configuration is one
    model = zoo.from_pretrained(out / "model")
    tokens = torch.randint(0, 256, (2, 24))
    assert torch.equal(model(tokens), result.model(tokens))
    assert zoo.load_config(out / "config.yaml").train.steps == 10
    assert tokenizer_of(out).vocab_size == tokenizer_of(out / "model").vocab_size == 257
    assert "\N{BLACK RIGHT-POINTING SMALL TRIANGLE}" in (out / "sample.txt").read_text()


def test_blocks_are_balanced_and_measured(whole):
    records = history(whole["hybrid"].out)
    assert set(records[0]["blocks"]) >= {"load_entropy", "max_load", "balance_loss"}
    # the warm-up of a router's capacity counts optimiser steps, not micro-steps
    capacities = [0.5 + 0.5 * (1 + math.cos(math.pi * min(i / 6, 1))) / 2 for i in range(10)]
    assert [r["blocks"]["share_1"] for r in records] == pytest.approx([int(c * 24) / 24 for c in capacities])
    bias = [t for n, t in weights(whole["hybrid"].out).items() if n.endswith("e_score_correction_bias")]
    assert bias and all(t.abs().max() > 0 for t in bias)  # update_bias ran once per step
    assert all((t / 1e-3).round().abs().max() <= 10 for t in bias)


def test_same_seed_same_numbers(whole, source):
    """Without a folder too; another seed gives others, and the process is left as it was."""
    torch.manual_seed(7)
    before = torch.get_rng_state()
    again = train(config("dense", source), progress=False)
    assert torch.equal(torch.get_rng_state(), before)
    assert gc.isenabled() and not torch.distributed.is_initialized() and not logging.getLogger().filters
    assert contract._auxiliary_scale == 1.0 and "LOCAL_RANK" not in os.environ
    assert again.out is None and again.loss == whole["dense"].loss and again.evaluation == whole["dense"].evaluation
    assert (
        train(config("dense", source, seed=1), progress=False, steps=1).loss != history(whole["dense"].out)[0]["loss"]
    )


@pytest.mark.parametrize("changes", [{"accumulation": 4}, {"activation_checkpoint": "full"}])
def test_how_it_is_computed_does_not_matter(whole, source, changes):
    result = train(config("dense", source, **changes), progress=False)
    assert result.loss == pytest.approx(whole["dense"].loss, rel=1e-4)


def test_recomputation_leaves_counters_alone(whole, source, tmp_path):
    train(config("hybrid", source, activation_checkpoint="full"), out=tmp_path / "run", progress=False)
    for a, b in zip(history(tmp_path / "run"), history(whole["hybrid"].out), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4) and a["blocks"] == pytest.approx(b["blocks"], rel=1e-3)


def test_synthetic_task(tmp_path):
    made = config("dense", Path("mqar"), steps=4)
    made |= {"vocab_size": 16, "data": {"source": "mqar", "num_pairs": 3}}
    result = train(made, out=tmp_path / "run", progress=False)
    assert set(result.evaluation) == {"loss", "accuracy", "scored_tokens"}
    assert result.evaluation["scored_tokens"] == 256 * 3
    assert "heldout_accuracy" in history(result.out)[-1]
    assert (result.out / "sample.txt").read_text().startswith("input: ")


def test_divergence_stops_with_one_message(source, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(
        ZooError, match=r"training diverged: the (loss|gradient norm) of step \d+ is (nan|inf); lower train\.lr"
    ) as caught:
        train(config("dense", source, lr=1e30, warmup_steps=0), out=out, progress=False)
    assert "\n" not in str(caught.value)
    assert all(math.isfinite(r["loss"]) for r in history(out))
    assert not torch.distributed.is_initialized() and gc.isenabled()


def test_requests_that_cannot_be_met(whole, source, tmp_path):
    with pytest.raises(ConfigError, match="resume needs the run folder"):
        train(config("dense", source), resume=True)
    with pytest.raises(ConfigError, match="holds no run to resume"):
        train(config("dense", source), out=tmp_path / "none", resume=True)
    with pytest.raises(ConfigError, match="holds a run: go on with it by resume"):
        train(config("dense", source), out=whole["dense"].out)
    with pytest.raises(ConfigError, match="is not an empty folder"):
        train(config("dense", source), out=source)
    with pytest.raises(ConfigError, match=r"vocab_size: the tokenizer bytes has 257 ids, vocab_size is 100"):
        train(config("dense", source) | {"vocab_size": 100}, progress=False)
    with pytest.raises(ConfigError, match=r"train.steps"):
        train(config("dense", source), steps=0, progress=False)
    with pytest.raises(ConfigError) as caught:
        train(config("dense", source, seq_len=32) | {"dim": 32}, out=whole["dense"].out, resume=True)
    assert "dim: was 16 when the run began, is 32" in str(caught.value)
    assert "train.seq_len: was 24 when the run began, is 32" in str(caught.value)


def test_free_folder(tmp_path):
    assert free_folder("a", tmp_path) == tmp_path / "a"
    (tmp_path / "a").mkdir()
    assert free_folder("a", tmp_path) == tmp_path / "a-2"


def test_nothing_is_said_on_stdout(source, capfd):
    train(config("dense", source), steps=2, progress=True)
    said = capfd.readouterr()
    assert said.out == ""
    assert "training 2/2" in said.err and "[titan]" not in said.err and "WARNING" not in said.err


@pytest.mark.slow
def test_compiled_layers_learn_the_same(whole, source, monkeypatch):
    monkeypatch.setattr(parallelize, "COMPILE_BACKEND", "aot_eager")
    result = train(config("dense", source, compile=True), progress=False)
    assert result.loss == pytest.approx(whole["dense"].loss, rel=1e-4)
