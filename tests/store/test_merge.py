"""Merging by learned coefficients: those that made a model are found again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import zoo
from zoo.errors import ConfigError
from zoo.store import merge, read_saved
from zoo.store.store import write

LAYER = [{"attention": {"num_heads": 2}}, {"swiglu": {"hidden_dim": 24}}]
SMALL = {"dim": 16, "vocab_size": 20, "trunk": [{"repeat": 2, "of": LAYER}]}
TUNED = {"layers.0.items.1": (0.8, 0.3), "layers.1.items.0": (0.2, 0.6)}


def moved(saved, taus, by):
    """The model with by[node] of each task vector, put in by hand."""
    nodes = dict(saved.nodes)
    for path, coefficients in by.items():
        tensors = {
            n: t + sum(c * tau[path][n] for c, tau in zip(coefficients, taus))
            for n, t in saved.nodes[path].tensors.items()
        }
        nodes[path] = replace(saved.nodes[path], tensors=tensors)
    return replace(saved, nodes=nodes)


@pytest.fixture(scope="module")
def problem(tmp_path_factory):
    """A base, two models tuned from it, and one that is between them, differently in every node."""
    torch.manual_seed(0)
    top: Path = tmp_path_factory.mktemp("merge")
    base = read_saved(zoo.build(SMALL).save_pretrained(top / "base"))
    taus = [{p: {n: 0.3 * torch.randn_like(t) for n, t in base.nodes[p].tensors.items()} for p in TUNED} for _ in "ab"]
    models = [moved(base, taus, dict.fromkeys(TUNED, one)) for one in ((1, 0), (0, 1))]
    return base, models, moved(base, taus, TUNED)


def test_the_coefficients_are_found(problem, tmp_path):
    base, models, wanted = problem
    teacher = wanted.model()
    batches = list(torch.randint(20, (150, 4, 16)))

    def apart(model, tokens):
        return (model(tokens) - teacher(tokens).detach()).square().mean()

    found = merge(base, models, batches, loss=apart, lr=0.05)
    assert found.coefficients.keys() == TUNED.keys()
    for path, expected in TUNED.items():
        assert found.coefficients[path] == pytest.approx(expected, abs=0.05)
    assert found.losses[-1] < 0.01 * found.losses[0]
    back = zoo.from_pretrained(write(found.saved, tmp_path / "merged"))
    tokens = batches[0]
    assert (back(tokens) - teacher(tokens)).norm() < 0.05 * (base.model()(tokens) - teacher(tokens)).norm()
    assert found.saved.nodes["norm"] is base.nodes["norm"]


def test_text_is_learned_from(problem):
    """By next tokens of what one tuned model would write, the loss falls below that of the base."""
    base, models, _ = problem
    with torch.no_grad():
        tokens = models[0].model().generate(torch.randint(20, (16, 4)), 20, temperature=1.0, seed=0)
    found = merge(base, models, [tokens] * 20)
    assert found.losses[-1] < found.losses[0]


def test_only_models_of_one_configuration_are_merged(problem, tmp_path):
    base = problem[0]
    other = read_saved(zoo.build({**SMALL, "trunk": [LAYER]}).save_pretrained(tmp_path / "other"))
    with pytest.raises(ConfigError, match=r"layers\.1\.items\.0: is missing; only models of one configuration"):
        merge(base, [other], [])
    with pytest.raises(ConfigError, match="the base has no such node"):
        merge(other, [base], [])
    wide = read_saved(zoo.build({**SMALL, "dim": 32}).save_pretrained(tmp_path / "wide"))
    with pytest.raises(ConfigError, match="is another block"):
        merge(base, [wide], [])
    with pytest.raises(ConfigError, match="nothing to merge"):
        merge(base, [base], [])


def test_licences_of_all_models_go_along(problem):
    base, models, _ = problem

    def under(saved, license):
        document = {**saved.graph.document, "origin": {"license": license}}
        return replace(saved, graph=replace(saved.graph, document=document))

    batches = list(torch.randint(20, (1, 2, 8)))
    found = merge(under(base, "mit"), [under(models[0], "mit"), under(models[1], "apache-2.0")], batches).saved
    assert found.graph.document["origin"]["license"] == "apache-2.0 AND mit" and "apache-2.0 AND mit" in found.config
    assert merge(base, models, batches).saved.config == base.config
