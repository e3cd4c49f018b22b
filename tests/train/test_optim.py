import math
import shutil
import sys

import pytest
import torch
from tiny_runs import config, history, same, weights
from torch import nn

import zoo
from zoo.errors import ConfigError, ZooError
from zoo.sections import TrainSection
from zoo.train import optim
from zoo.train.muon import Muon, orthogonal
from zoo.train.run import train
from zoo.train.select import modules, parameters

pytestmark = pytest.mark.usefixtures("short_samples")


def model(*trunk, **more):
    document = {"name": "m", "dim": 32, "vocab_size": 11, "trunk": list(trunk), "train": more}
    return zoo.build(document, device="meta"), TrainSection.from_mapping(more)


def updated_by(groups):
    return {name: (g.optimizer, g.options) for g in groups for name in g.names}


# ------------------------------------------------------------------------------------------------ muon
def test_orthogonal_moves_singular_values_by_the_published_polynomial():
    torch.manual_seed(0)
    for shape in ((12, 7), (7, 12), (3, 6, 6)):
        g = torch.randn(shape, dtype=torch.float64)
        u, s, vh = torch.linalg.svd(g, full_matrices=False)
        s = s / g.flatten(-2).norm(dim=-1)[..., None]
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        assert torch.allclose(orthogonal(g), u * s[..., None, :] @ vh, atol=1e-10)
    square = torch.linalg.svdvals(orthogonal(torch.randn(16, 64)))
    assert square.min() > 0.6 and square.max() < 1.25


def test_muon_is_the_one_of_torch():
    """Theirs iterates in bfloat16."""
    torch.manual_seed(0)
    ours = nn.Parameter(torch.randn(24, 16))
    theirs = nn.Parameter(ours.detach().clone())
    options = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.2}
    a, b = Muon([ours], **options), torch.optim.Muon([theirs], **options, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        ours.grad = torch.randn(24, 16)
        theirs.grad = ours.grad.clone()
        before = ours.detach().clone()
        a.step()
        b.step()
        assert (ours - theirs).norm() < 0.02 * (ours - before).norm() * 4


def test_muon_treats_experts_one_by_one():
    torch.manual_seed(0)
    stacked = nn.Parameter(torch.randn(3, 8, 5))
    alone = [nn.Parameter(w.clone()) for w in stacked.detach()]
    stacked.grad = torch.randn(3, 8, 5)
    for p, g in zip(alone, stacked.grad, strict=True):
        p.grad = g.clone()
    Muon([stacked]).step()
    Muon(alone).step()
    assert torch.allclose(stacked, torch.stack(list(alone)), atol=1e-6)
    with pytest.raises(ValueError, match="matrices"):
        Muon([nn.Parameter(torch.zeros(3))])


def test_muon_takes_the_matrices_of_the_trunk():
    m, section = model(
        [{"mamba2": {"head_dim": 16}}, {"moe": {"num_experts": 4, "hidden_dim": 16}}],
        {"workspace": {"slots": 4, "active": 2, "rank": 8}},
        optimizer="muon",
    )
    by = updated_by(optim.groups(m, section))
    assert set(by) == {n for n, _ in m.named_parameters()}
    taken = {n.removeprefix("layers.") for n, (name, _) in by.items() if name == "Muon"}
    assert taken == {
        "0.items.0.block.in_proj.weight", "0.items.0.block.out_proj.weight", "0.items.1.block.experts.gate_up_proj",
        "0.items.1.block.experts.down_proj", "1.block.q_proj.weight", "1.block.k_proj.weight",
        "1.block.write_down.weight", "1.block.write_up.weight", "1.block.controller.weight",
    }  # fmt: skip
    muon_options, adam = by["layers.1.block.q_proj.weight"][1], by["tok_embeddings.weight"]
    assert muon_options == {"lr": 2e-3, "momentum": 0.95, "weight_decay": 0.1}
    assert adam == ("AdamW", {"lr": 2e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1})


# ---------------------------------------------------------------------------------------------- groups
def test_decay_spares_vectors_and_what_blocks_declare():
    m, section = model("mamba", "kda", "s4d", "rwkv7", [{"attention": {"num_heads": 2}}, "swiglu"])
    decayed = {n.rpartition(".")[2] for n, (_, o) in updated_by(optim.groups(m, section)).items() if o["weight_decay"]}
    assert decayed == {"weight", "C"}
    norms = {n for n, (_, o) in updated_by(optim.groups(m, section)).items() if "norm" in n and o["weight_decay"]}
    assert not norms


def test_groups_change_rate_and_decay():
    m, section = model(
        {"repeat": 3, "of": [{"attention": {"num_heads": 2}}, "swiglu"]},
        groups=[
            {"match": "layers.1", "lr_scale": 0.5},
            {"match": "swiglu", "weight_decay": 0.3},
            {"match": "**.o_proj.weight", "lr_scale": 0.25, "weight_decay": 0.0},
        ],
    )
    by = {n: (o["lr"] / 2e-3, o["weight_decay"]) for n, (_, o) in updated_by(optim.groups(m, section)).items()}
    layer = "layers.{}.items.{}.block.{}.weight"
    assert by[layer.format(1, 0, "q_proj")] == (0.5, 0.1)
    assert by[layer.format(1, 1, "up_proj")] == (1.0, 0.3)  # the last one that matches
    assert by[layer.format(1, 0, "o_proj")] == (0.25, 0.0)
    assert by[layer.format(2, 0, "q_proj")] == (1.0, 0.1)
    assert by["layers.1.items.0.norm.weight"] == (0.5, 0.0)  # spared stays spared


def test_patterns():
    m, _ = model(
        [{"attention": {"num_heads": 2}}, "swiglu"], {"swiglu": {}, "share": "a"}, {"swiglu": {}, "share": "a"}
    )
    assert list(modules(m, "layers.*")) == ["layers.0", "layers.1"]
    assert list(modules(m, "swiglu")) == ["layers.0.items.1.block", "layers.1.block"]
    assert parameters(m, "layers.2") == parameters(m, "layers.1")  # shared
    assert parameters(m, "tok_embed*") == {"tok_embeddings.weight"}
    assert parameters(m, "**.q_proj") == {"layers.0.items.0.block.q_proj.weight"}
    assert parameters(m, "**") == {n for n, _ in m.named_parameters()}
    assert not parameters(m, "layers.*.q_proj") and not modules(m, "layer")


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("layers.7", "did you mean layers."),
        ("swigl", "did you mean swiglu"),
        ("zzz", "blocks of this model: attention"),
    ],
)
def test_a_pattern_that_matches_nothing(pattern, hint):
    m, section = model({"attention": {"num_heads": 2}}, "swiglu", groups=[{"match": pattern}])
    with pytest.raises(ConfigError, match=r"train.groups\[0\].match: nothing in the model is called") as caught:
        optim.groups(m, section)
    assert hint in str(caught.value)


def test_groups_are_checked_with_the_document():
    document = {"dim": 32, "vocab_size": 11, "name": "m", "trunk": ["swiglu"]}
    bad = [{"match": "swiglu", "lr_scale": -1}, {"lr": 2}, 3]
    with pytest.raises(ConfigError) as caught:
        zoo.load_config(document | {"train": {"groups": bad, "muon_lr": 1.0}})
    text = str(caught.value)
    assert "train.groups[0].lr_scale: must be at least 0" in text
    assert "train.groups[1].lr: unknown option" in text and "train.groups[2]: must be a mapping" in text
    with pytest.raises(ConfigError, match=r"train.groups[0]?.*match.*must name"):
        zoo.load_config(document | {"train": {"groups": [{"lr_scale": 1}]}})
    with pytest.raises(ConfigError, match="muon_lr: goes with optimizer: muon, this is adamw"):
        zoo.load_config(document | {"train": {"muon_lr": 1.0}})


# ------------------------------------------------------------------------------------------- schedules
def factors(steps, **options):
    from zoo.train import titan  # binds the device
    from zoo.train.titan_optim import lr_schedule

    assert titan
    given = TrainSection.from_mapping({"steps": steps, **options})
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedulers = lr_schedule(given).build(optimizers=[optimizer], training_steps=steps)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedulers.step()
    return found


@pytest.mark.parametrize("low", [0.0, 0.1])
@pytest.mark.parametrize(
    ("options", "start", "shape"),
    [
        ({"schedule": "cosine"}, 4, lambda p: (1 + math.cos(math.pi * p)) / 2),
        ({"schedule": "linear"}, 4, lambda p: 1 - p),
        ({"schedule": "wsd", "decay_fraction": 0.25}, 15, lambda p: 1 - p),
        ({"schedule": "wsd", "decay_fraction": 0.25, "wsd_decay": "sqrt"}, 15, lambda p: 1 - math.sqrt(p)),
    ],
)
def test_schedules(options, start, shape, low):
    """Linear to 1 in step `warmup_steps`; then level; then the curve, at its end in the step after the last."""
    found = factors(20, warmup_steps=4, min_lr_factor=low, **options)
    expected = [(i + 1) / 4 for i in range(4)]
    for i in range(4, 20):
        p = max(0, i - start) / (20 - start)
        expected.append(low + (1 - low) * shape(p))
    assert found == pytest.approx(expected, abs=1e-12)


# ------------------------------------------------------------------------------------------------ runs
def test_muon_learns_and_resumes(source, tmp_path):
    given = config("dense", source, steps=5, optimizer="muon", checkpoint_every=2)
    given["train"]["groups"] = [{"match": "layers.0", "lr_scale": 0.5}]
    whole = train(given, out=tmp_path / "whole", progress=False)
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint" / "step-5")
    train(given, out=tmp_path / "run", resume=True, progress=False)
    assert same(weights(tmp_path / "run"), weights(whole.out)) and history(tmp_path / "run") == history(whole.out)
    assert whole.loss < history(whole.out)[0]["loss"]
    assert [r["lr"] for r in history(whole.out)][:2] == [0.01, 0.02]  # of the section, not of a group


def test_adamw8bit_needs_its_package(source, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(ZooError, match=r"optimizer: adamw8bit needs the package torchao: pip install 'block-zoo\[low"):
        train(config("dense", source, optimizer="adamw8bit"), progress=False)


def test_adamw8bit_learns_and_resumes(source, tmp_path):
    pytest.importorskip("torchao.optim")
    with torch.compiler.set_stance("force_eager"):  # it compiles its step, a minute on a processor
        made = config("dense", source, optimizer="adamw8bit", steps=4, checkpoint_every=2) | {"dim": 64}
        whole = train(made, out=tmp_path / "whole", progress=False)
        shutil.copytree(tmp_path / "whole", tmp_path / "run")
        shutil.rmtree(tmp_path / "run" / "checkpoint" / "step-4")
        train(made, out=tmp_path / "run", resume=True, progress=False)
    assert same(weights(tmp_path / "run"), weights(whole.out))
    assert whole.loss < history(whole.out)[0]["loss"]
