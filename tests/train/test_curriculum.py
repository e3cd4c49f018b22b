import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp
from tiny_runs import config, history, same, weights

import zoo
from zoo.errors import ConfigError
from zoo.graph.loader import config_names
from zoo.sections import TrainSection
from zoo.train import optim, parallelize
from zoo.train.curriculum import Curriculum, check, scale_auxiliary_losses
from zoo.train.folder import read_document
from zoo.train.run import train
from zoo.train.select import parameters

DOCUMENT = {
    "name": "m", "dim": 16, "vocab_size": 257,
    "trunk": [
        {"parallel": [{"diag_ssm": {}}, {"chunk_moe": {"num_experts": 2, "hidden_dim": 8, "chunk_size": 4}}],
         "norm": "rms", "merge": "gated", "gates": [0.8, 0.5]},
        [{"attention": {"num_heads": 2}}, {"swiglu": {"hidden_dim": 16}}],
        {"structured_ffn": {"hidden_dim": 16, "blocks": 2, "guide": 1.0}},
    ],
}  # fmt: skip
STAGES = [
    {"until": 0.25},
    {"until": 0.5, "enable": ["chunk_moe"], "ramp": {"chunk_moe": {"strength": 0.0, "temperature": 2.0}}},
    {"until": 0.75, "enable": ["layers.1"], "freeze": ["diag_ssm", "tok_embeddings"]},
    {"until": 1.0, "ramp": {"layers.2": {"guide": [1.0, 0.0]}, "chunk_moe": {"aux_coef": 0.05}}},
]


pytestmark = pytest.mark.usefixtures("short_samples")


def recipe(**given):
    return TrainSection.from_mapping(given)


def document(source, **more):
    made = config("dense", source, **more)
    return made | DOCUMENT | {"train": made["train"]}


def test_what_holds_when():
    torch.manual_seed(0)
    model = zoo.build(DOCUMENT)
    whole = zoo.build(DOCUMENT)
    stages = recipe(curriculum=STAGES).curriculum
    check(model, recipe(curriculum=STAGES))
    curriculum = Curriculum(model, stages)
    moe = model.layers[0].branches[1].block
    x = torch.randn(2, 12, 16)
    expected = {
        # progress: (strength, temperature, aux_coef, guide), chunk_moe and layers.1 in, frozen parameters of
        0.0: ((0.0, 2.0, 0.05, 1.0), False, False, ("chunk_moe", "layers.1")),
        0.24: ((0.0, 2.0, 0.05, 1.0), False, False, ("chunk_moe", "layers.1")),
        0.25: ((0.0, 2.0, 0.05, 1.0), True, False, ("layers.1",)),
        0.375: ((0.5, 1.5, 0.05, 1.0), True, False, ("layers.1",)),
        0.5: ((1.0, 1.0, 0.05, 1.0), True, True, ("diag_ssm", "tok_embeddings")),
        0.75: ((1.0, 1.0, 0.05, 1.0), True, True, ()),
        0.875: ((1.0, 1.0, 0.03, 0.5), True, True, ()),
        1.0: ((1.0, 1.0, 0.01, 0.0), True, True, ()),
    }
    for progress, ((strength, *numbers), has_moe, has_layer, frozen) in expected.items():
        curriculum.begin(progress)
        found = [moe.temperature, moe.aux_coef, float(model.layers[2].block.guide)]
        assert found == pytest.approx(numbers)
        given, full = moe(x), whole.layers[0].branches[1].block(x)
        if not has_moe or strength == 0:
            assert not given.any()
        elif strength == 0.5:
            whole.layers[0].branches[1].block.temperature = 1.5
            assert torch.allclose(given, 0.5 * whole.layers[0].branches[1].block(x))
            whole.layers[0].branches[1].block.temperature = 1.0
        else:
            assert torch.equal(given, full)
        assert torch.equal(model.layers[1](x), x) is not has_layer
        names = set().union(*(parameters(model, pattern) for pattern in frozen)) if frozen else set()
        still = {id(p) for p in curriculum.frozen}
        assert {n for n, p in model.named_parameters() if id(p) in still} == names


def test_a_block_comes_in_without_a_jump():
    model = zoo.build(DOCUMENT)
    curriculum = Curriculum(model, recipe(curriculum=STAGES).curriculum)
    tokens = torch.randint(0, 256, (2, 12))
    logits = []
    for progress in (0.2499, 0.25):
        curriculum.begin(progress)
        logits.append(model(tokens))
    assert torch.equal(*logits)


def test_auxiliary_losses_are_scaled():
    model = zoo.build(DOCUMENT | {"trunk": ["chunk_moe", {"moe": {"aux_coef": 0.5, "balance": "aux"}}]}, device="meta")
    scale_auxiliary_losses(model, {"chunk_moe": 0.0, "layers.*": 2.0})
    assert (model.layers[0].block.aux_coef, model.layers[1].block.aux_coef) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"aux": {"chunk_mo": 1}}, "aux.chunk_mo: nothing in the model is called 'chunk_mo'; did you mean chunk_moe"),
        ({"aux": {"attention": 1}}, "train.aux.attention: has no auxiliary loss"),
        ({"curriculum": [{"freeze": ["layers.9"]}]}, r"train.curriculum[0].freeze: nothing in the model"),
        ({"curriculum": [{"until": 0.5}, {"enable": ["norm"]}]}, "train.curriculum[1]: 'norm' is no block"),
        ({"curriculum": [{"ramp": {"chunk_moe": {"temp": 2}}}]}, "no number of this name; did you mean temperature"),
        ({"curriculum": [{"ramp": {"chunk_moe": {"temperature": [2, 3]}}}]}, "must end at the configured value 1"),
        (
            {"curriculum": [{"until": u, "ramp": {"chunk_moe": {"strength": 0}}} for u in (0.5, 1.0)]},
            "train.curriculum[1].ramp.chunk_moe.strength: is ramped already",
        ),
    ],
)  # fmt: skip
def test_requests_that_cannot_be_met(given, words):
    with pytest.raises(ConfigError) as caught:
        check(zoo.build(DOCUMENT, device="meta"), recipe(**given))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ([{"until": 0.5}, {"until": 0.5}], "must have stages that end one after the other"),
        ([{"enable": ["chunk_moe"]}], "cannot enable in its first stage"),
        ([{"ramp": {"chunk_moe": {"temperature": [1, 2, 3]}}}], "a number or a pair [start, end]"),
        ([{"until": 2}], "must be at most 1"),
    ],
)
def test_stages_are_checked_with_the_document(stages, words):
    with pytest.raises(ConfigError) as caught:
        zoo.load_config(DOCUMENT | {"train": {"curriculum": stages}})
    assert words in str(caught.value) and "train.curriculum" in str(caught.value)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_run_goes_through_its_stages_and_resumes(source, tmp_path):
    given = document(source, curriculum=STAGES, steps=9, checkpoint_every=1, keep_checkpoints=0)
    whole = train(given, out=tmp_path / "whole", progress=False)

    model = zoo.build(DOCUMENT)

    def weights_after(step):
        state = {f"model.{n}": torch.empty_like(p) for n, p in model.named_parameters()}
        dcp.load(state, checkpoint_id=whole.out / "checkpoint" / f"step-{step}", no_dist=True)
        return {n.removeprefix("model."): t for n, t in state.items()}

    # step n is 1/8 of the run after step n - 1
    steps = {n: weights_after(n) for n in (1, 2, 4, 6)}

    def moved(pattern, a, b):
        return [not torch.equal(steps[a][n], steps[b][n]) for n in parameters(model, pattern)]

    assert not any(moved("chunk_moe", 1, 2)) and all(moved("chunk_moe", 2, 4))
    assert not any(moved("layers.1", 1, 4)) and all(moved("layers.1", 4, 6))
    assert all(moved("diag_ssm", 1, 4)) and not any(moved("diag_ssm", 4, 6)) and not any(moved("tok_*", 4, 6))
    assert weights(whole.out)["layers.2.block.guide"] == 0
    for last in (2, 5):
        out = tmp_path / f"resumed-{last}"
        shutil.copytree(whole.out, out)
        for step in range(last + 1, 10):
            shutil.rmtree(out / "checkpoint" / f"step-{step}")
        train(given, out=out, resume=True, progress=False)
        assert same(weights(out), weights(whole.out)) and history(out) == history(whole.out)


def test_shipped_recipes_fit_their_models():
    found = 0
    for name in config_names():
        section = recipe(**(read_document(name).get("train") or {}))
        if section.aux or section.curriculum or section.groups:
            model = zoo.build(name, device="meta")
            check(model, section)
            optim.groups(model, section)
            found += 1
    assert found


@pytest.mark.slow
def test_compiled(source, monkeypatch):
    monkeypatch.setattr(parallelize, "COMPILE_BACKEND", "aot_eager")
    given = document(source, curriculum=STAGES, steps=9)
    losses = []
    for compiled in (False, True):
        given["train"]["compile"] = compiled
        losses.append(train(given, progress=False).loss)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
