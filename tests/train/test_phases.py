"""Phases: dynamic programming and max-cut against brute force, a model with known phases, the student."""

import itertools

import numpy as np
import pytest
import torch
import yaml
from tiny_vision import ATTENTION, known_phases

import zoo
from zoo.errors import ConfigError
from zoo.graph.loader import load_graph
from zoo.train.phases import (
    are_contiguous,
    best_cut,
    contiguous,
    find_phases,
    layer_distances,
    phase_names,
    share_inside,
    student,
    student_text,
    summary,
)

SIZES = (3, 2, 4)
KNOWN = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]


def symmetric(layers, seed=0):
    half = np.triu(np.random.default_rng(seed).uniform(0, 1, (layers, layers)), 1)
    return half + half.T


def blocks(sizes, within=0.05, across=1.0):
    """Distances of layers that stand in phases of these sizes."""
    phase = np.repeat(np.arange(len(sizes)), sizes)
    made = np.where(phase[:, None] == phase, within, across).astype(float)
    np.fill_diagonal(made, 0)
    return made


def cost(distances, groups):
    return sum(distances[a - 1, b - 1] for g in groups for a, b in itertools.combinations(g, 2))


def cut_everywhere(layers, count, least):
    """Every way to cut 1 .. layers into `count` runs of at least `least`."""
    for cuts in itertools.combinations(range(1, layers), count - 1):
        ends = (0, *cuts, layers)
        if all(b - a >= least for a, b in itertools.pairwise(ends)):
            yield [list(range(a + 1, b + 1)) for a, b in itertools.pairwise(ends)]


# ------------------------------------------------------------------------------------------------ finders
@pytest.mark.parametrize("layers, least", [(1, 1), (2, 1), (5, 2), (9, 1), (10, 2), (10, 3)])
def test_dynamic_programming_is_brute_force(layers, least):
    for seed in range(3):
        distances = symmetric(layers, seed)
        found = contiguous(distances, least)
        assert list(found) == list(range(1, layers // least + 1))
        for count, (total, groups) in found.items():
            best = min(cut_everywhere(layers, count, least), key=lambda g: cost(distances, g))
            assert groups == best and total == pytest.approx(cost(distances, best))


@pytest.mark.parametrize("members, least", [(2, 1), (5, 1), (9, 2)])
def test_best_cut_is_brute_force(members, least):
    distances = symmetric(12)
    group = sorted(np.random.default_rng(1).permutation(12)[:members].tolist())
    gain, parts = best_cut(distances, group, least)

    def across(part):
        return sum(distances[a, b] for a in part for b in group if b not in part)

    sizes = range(least, members - least + 1)
    assert gain == pytest.approx(max(across(p) for n in sizes for p in itertools.combinations(group, n)))
    assert gain == pytest.approx(across(parts[0])) and sorted(parts[0] + parts[1]) == group
    assert best_cut(distances, group[:1], 1)[0] == -np.inf


@pytest.mark.parametrize("method", ["dp", "maxcut"])
def test_phases_that_are_there(method):
    distances = blocks(SIZES)
    assert find_phases(distances, method=method) == KNOWN  # the number found by eps
    assert find_phases(distances, method=method, count=3) == KNOWN
    assert find_phases(distances, method=method, eps=1.0) == [list(range(1, 10))]
    assert share_inside(distances, KNOWN) == pytest.approx(0.05 * 10 / (0.05 * 10 + 26))
    # a cut that separates nothing is not made
    assert find_phases(np.zeros((4, 4)), method=method, eps=0.0) == [[1, 2, 3, 4]]


def test_a_phase_of_maxcut_may_come_back():
    """Layers 1, 2, 5 and 6 alike: max-cut sees it, dynamic programming cuts neighbours only."""
    phase = np.array([0, 0, 1, 1, 0, 0])
    distances = (phase[:, None] != phase).astype(float)
    groups = find_phases(distances, method="maxcut", count=2)
    assert groups == [[1, 2, 5, 6], [3, 4]] and not are_contiguous(groups)
    assert phase_names(groups) == ["1-2,5-6", "3-4"]
    assert find_phases(distances, count=3) == [[1, 2], [3, 4], [5, 6]]


def test_what_cannot_be_found():
    with pytest.raises(ConfigError, match="3 phases of at least 2 layers do not fit into 5 layers"):
        find_phases(symmetric(5), count=3)
    with pytest.raises(ConfigError, match="for up to 24 layers, not 25: use dp"):
        find_phases(symmetric(25), method="maxcut", count=2)


# ------------------------------------------------------------------------------------------------- models
class Noise:
    """Rows of random images."""

    def row(self, index):
        from zoo.train.loader import Row

        pixels = np.random.default_rng(index).normal(size=(3, 16, 16)).astype(np.float32)
        return Row(pixels, np.array([0]))


def test_distances_are_what_they_say():
    model = known_phases(SIZES, num_registers=2).train()
    distances = layer_distances(model, Noise(), 5, 2)
    assert model.training and distances.shape == (9, 9)
    images = torch.stack([torch.from_numpy(Noise().row(i).inputs) for i in range(5)])
    with torch.no_grad():
        stream = model.eval().trajectory(images)
    assert len(stream) == 10 and torch.equal(stream[0], model.embed(images))
    torch.testing.assert_close(model.norm(stream[-1]), model.features(images))
    z = [torch.cat([x[:, 0], x[:, 3:].mean(1)], 1) for x in stream[1:]]
    assert torch.equal(summary(model, stream[1]), z[0])
    expected = [[float((1 - torch.cosine_similarity(a, b)).mean()) for b in z] for a in z]
    np.testing.assert_allclose(distances, expected, atol=1e-5)


@pytest.mark.parametrize("method", ["dp", "maxcut"])
def test_known_phases_are_recovered(method):
    distances = layer_distances(known_phases(SIZES), Noise(), 8, 4)
    assert find_phases(distances, method=method) == KNOWN
    assert find_phases(distances, method=method, count=3) == KNOWN


# ------------------------------------------------------------------------------------------------ student
def test_student_is_a_configuration_of_stages():
    graph = load_graph("vit_small", ["trunk[0].repeat=6"])
    text = student_text(student(graph, [[1, 2, 3, 4], [5, 6]], "runs/vit"))
    document = yaml.safe_load(text)
    assert document["distill"] == {"teacher": "runs/vit"} and document["name"] == "vit_small_raptor2"
    assert document["trunk"] == [
        {"stage": 4, "first": 1, "of": "layer"}, {"stage": 2, "first": 5, "of": "layer"},
    ]  # fmt: skip
    model = zoo.build(document, device="meta")
    teacher = zoo.build("vit_small", device="meta")
    assert model.options == teacher.options and repr(model.norm) == repr(teacher.norm)
    attention = model.layers[0].body.items[0].block
    assert (attention.num_heads, attention.causal, attention.rotary_dim) == (4, False, 0)
    swiglu = model.layers[0].body.items[1].block
    assert swiglu.hidden_dim == 4 * model.dim and swiglu.up_proj.bias is not None


def test_a_phase_begins_with_the_mixer_of_its_first_layer():
    trunk = [{"repeat": 2, "of": [[ATTENTION, "swiglu"]]}, {"stage": 2, "of": [{"retention": {}}, "swiglu"]}]
    document = student(
        load_graph({"dim": 64, "architecture": "vision", "vision": {}, "trunk": trunk}), [[1, 2], [3, 4]], "x"
    )
    assert document["define"]["layer"][0] == ATTENTION and document["define"]["layer2"][0] == {"retention": {}}
    assert [stage["of"] for stage in document["trunk"]] == ["layer", "layer2"]


def test_a_layer_without_a_mixer_has_no_student():
    graph = load_graph({"dim": 32, "architecture": "vision", "vision": {}, "trunk": [[ATTENTION], ["swiglu"]]})
    with pytest.raises(ConfigError, match="layer 2 is no list of blocks with one mixer"):
        student(graph, [[1], [2]], "x")
