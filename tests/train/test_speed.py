import json

import pytest
import torch
from tiny_runs import config, texts

import zoo
from zoo.sections import TrainSection
from zoo.train import prepare, speed
from zoo.train.curve import read_metrics
from zoo.train.folder import read_document
from zoo.train.progress import step_text
from zoo.train.run import train


def test_every_line_says_how_much_of_the_machine_was_used(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "SAMPLE_TOKENS", 8)
    made = config("dense", texts(tmp_path / "texts"), steps=2, accumulation=2, activation_checkpoint="full")
    train(made, out=tmp_path / "run", progress=False)
    said = json.loads((tmp_path / "run" / "environment.json").read_text())["speed"]
    assert said["flops_per_step"] == zoo.estimate(made, batch_size=4, seq_len=24, mode="train").flops
    if not torch.cuda.is_available():
        assert said["peak_from"].startswith("measured: a 1024 x 1024 product in float32")
    for record in read_metrics(tmp_path / "run" / "metrics.jsonl"):
        wanted = said["flops_per_step"] / record["seconds"] / said["peak_flops"]
        assert record["mfu"] == pytest.approx(wanted) and 0 < record["mfu"] < 1
        assert 10**8 < record["memory"] < 10**11


def test_no_share_is_told_where_the_cost_model_knows_only_a_part():
    assert speed.speed_of({"distill": {"teacher": "a"}}, TrainSection()) is None
    record = {"loss": 2.0, "tokens_per_second": 12345.6, "memory": 1.26e9}
    assert step_text(record, "", "tokens") == "loss 2.000  12,346 tokens/s  1.3 GB"
    assert step_text(record | {"mfu": 0.417}, "", "images").endswith("images/s  MFU 42 %  1.3 GB")


def test_images_are_counted_in_tokens():
    made = speed.speed_of(read_document("vit_small"), TrainSection(batch_size=2))
    tokens = zoo.estimate("vit_small", batch_size=2, seq_len=65)
    assert made.flops_per_step == tokens.flops


@pytest.mark.parametrize(
    "name, flops",
    [("NVIDIA H100 80GB HBM3", 989.5e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA A100-SXM4-40GB", 312e12)],
)
def test_known_cards(monkeypatch, name, flops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert speed.peak.__wrapped__("cuda").flops == flops
