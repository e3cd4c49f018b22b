"""What differs between a trained model and one made of it, and teaching that."""

from __future__ import annotations

import copy

import pytest
import torch

import zoo
from zoo.graft import distill, pair, replace

LAYER = [{"attention": {"num_heads": 2}}, {"swiglu": {"hidden_dim": 48}}]
BASE = {"dim": 32, "vocab_size": 40, "trunk": [{"repeat": 3, "of": LAYER}]}


@pytest.fixture(scope="module")
def teacher():
    """Three layers whose answers are far from even."""
    model = zoo.build(BASE)
    with torch.no_grad():
        for p in model.layers.parameters():
            p.mul_(3)
    return model


def changed(teacher, trunk, **top):
    """A model of another trunk, with the weights of the teacher where it has them."""
    made = zoo.build({**BASE, "trunk": trunk, **top}, seed=7)
    theirs = teacher.state_dict()
    same = {n: theirs[n] for n, t in made.state_dict().items() if n in theirs and theirs[n].shape == t.shape}
    made.load_state_dict(same, strict=False)
    if len(made.layers) > len(teacher.layers):  # their last layer stays the last
        made.layers[-1].load_state_dict(teacher.layers[-1].state_dict())
    return made


def batches(count, seed=0):
    return torch.randint(40, (count, 4, 24), generator=torch.Generator().manual_seed(seed))


def apart(teacher, student, x):
    with torch.no_grad():
        wanted = teacher(x).log_softmax(-1)
        return float((wanted.exp() * (wanted - student(x).log_softmax(-1))).sum(-1).mean())


GRAFTS = {"gla": {}, "moba": {"block_size": 4, "top_k": 2}, "attention": {"window": 4}}


@pytest.mark.parametrize("block, options", GRAFTS.items(), ids=str)
def test_a_saved_graft_is_taught_as_the_graft_itself(teacher, tmp_path, block, options):
    """One mechanism: the same batches make the same weights, and nothing else moves. moba and a window keep
    every weight and are still found."""
    plan = replace(copy.deepcopy(teacher), "attention", block, **options)
    student = zoo.from_pretrained(plan.model.save_pretrained(tmp_path))
    found = pair(teacher, student)
    assert list(found.blocks) == plan.sites
    before = {n: p.clone() for n, p in student.named_parameters()}
    settings = {"layer_steps": 2, "model_steps": 2, "lr": 1e-2}
    assert distill(found, batches(4), **settings) == distill(plan, batches(4), **settings)
    for (name, ours), theirs in zip(student.named_parameters(), plan.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
        assert torch.equal(ours, before[name]) == (".items.0.block." not in name), name


def test_what_differs_is_found(teacher):
    linear, ffn = {"gla": {"num_heads": 2}}, LAYER[1]

    def sites(trunk):
        return list(pair(teacher, changed(teacher, trunk)).blocks)

    assert sites([LAYER, [linear, ffn], LAYER]) == ["layers.1.items.0.block"]
    assert sites([LAYER, LAYER, [linear, {"mlp": {}}]]) == ["layers.2.items.0.block", "layers.2.items.1.block"]
    assert sites([LAYER, {"repeat": 2, "of": LAYER, "norm": "layer"}]) == [
        f"layers.{i}.items.{j}" for i in (1, 2) for j in (0, 1)
    ]
    assert sites([LAYER, [{"parallel": LAYER}], LAYER]) == ["layers.1"]
    assert sites([LAYER, [linear, ffn], [linear, ffn], LAYER]) == ["layers.1-2"]
    # numbers alone, as after training one block
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        student.layers[1].items[1].block.down_proj.weight[0, 0] += 1
    assert list(pair(teacher, student).blocks) == ["layers.1.items.1.block"]
    assert list(pair(copy.deepcopy(teacher).bfloat16(), student).blocks) == ["layers.1.items.1.block"]


@pytest.mark.parametrize("config", ["hydra_small", "hnet_small", "zamba2_small", "mor_small", "griffin_small"])
def test_one_block_anywhere_is_found(config):
    """Inside loops, branches, hierarchies and shared layers."""
    teacher = zoo.build(config)
    student = copy.deepcopy(teacher)
    blocks = [n for n, m in student.named_modules() if n.endswith(".block")]
    for name in (blocks[0], blocks[len(blocks) // 2], blocks[-1]):
        with torch.no_grad():
            weight = next(student.get_submodule(name).parameters())
            weight += 1
        found = pair(teacher, student).blocks
        inside = {id(p) for block in found.values() for p in block.parameters()}
        assert id(weight) in inside and name in found, (name, list(found))
        weight.data -= 1


def test_layers_of_another_number_are_taught_as_one(teacher):
    student = changed(teacher, [LAYER, [{"gla": {"num_heads": 2}}], LAYER[1:], [{"gla": {"num_heads": 2}}], LAYER])
    found, x = pair(teacher, student), batches(1, seed=9)[0]
    assert list(found.blocks) == ["layers.1-3"]
    before, first = apart(teacher, student, x), copy.deepcopy(student.layers[0])
    losses = distill(found, batches(80), layer_steps=60, model_steps=20, lr=1e-2)
    assert losses["layers"][-1] < 0.7 * losses["layers"][0] and apart(teacher, student, x) < 0.6 * before
    assert all(torch.equal(a, b) for a, b in zip(student.layers[0].parameters(), first.parameters()))


def test_it_stops_between_steps_and_keeps_what_was_learned(teacher):
    student = changed(teacher, [LAYER, [{"gla": {"num_heads": 2}}, LAYER[1]], LAYER])
    before, asked = copy.deepcopy(student), iter([False] * 3 + [True] * 2)
    losses = distill(pair(teacher, student), batches(9), layer_steps=5, model_steps=4, stop=lambda: next(asked))
    assert (len(losses["layers"]), len(losses["model"])) == (3, 0)
    assert not torch.equal(
        student.layers[1].items[0].block.q_proj.weight, before.layers[1].items[0].block.q_proj.weight
    )
    assert all(p.requires_grad for p in student.parameters())


def test_what_is_no_student_is_refused(teacher):
    def refused(student, said):
        with pytest.raises(zoo.ConfigError, match=said):
            pair(teacher, student)

    refused(copy.deepcopy(teacher), "nothing is to be taught")
    refused(zoo.build({**BASE, "dim": 64}), "tok_embeddings of the student is not the teacher's")
    other = copy.deepcopy(teacher)
    other.norm.weight.data += 1
    refused(other, "norm of the student is not the teacher's")
    shorter = changed(teacher, [LAYER])
    refused(shorter, "left out or repeated")
