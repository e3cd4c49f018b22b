"""Blocks of two widths in one model: the maps between their streams, found by least squares."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import zoo
from zoo.errors import ConfigError
from zoo.graph.stitch import Stitch
from zoo.store import Store, fit, read_saved
from zoo.store.stitch import _Regression
from zoo.store.store import write

TEXT = Path(argparse.__file__).read_bytes()
WIDTHS = {"wide": 48, "narrow": 32}
LAYER = [{"attention": {"num_heads": 2}}, {"swiglu": {"hidden_dim": 64}}]
STITCHED = {"dim": 48, "vocab_size": 256, "trunk": [{"stitch": 32, "of": [LAYER]}, LAYER, LAYER]}
TAKES = ["all=wide", "layers.0.body.items.0=narrow:layers.0"]


def rows(count: int, seed: int) -> torch.Tensor:
    """Windows of the text but for its end, which is held out."""
    text = torch.tensor(list(TEXT[:-10_000]))
    starts = torch.randint(len(text) - 49, (count,), generator=torch.Generator().manual_seed(seed))
    return torch.stack([text[at : at + 49] for at in starts])


@torch.no_grad()
def loss(model) -> float:
    text = torch.tensor(list(TEXT[-10_000:]))[: 200 * 49].view(-1, 49)
    return float(F.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten()))


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    """Two models of different widths that learned the same text, for two seconds each."""
    top = tmp_path_factory.mktemp("stitch")
    made = Store(top / "store")
    for name, dim in WIDTHS.items():
        model = zoo.build({"dim": dim, "vocab_size": 256, "trunk": [{"repeat": 3, "of": LAYER}]}, seed=dim).train()
        adam = torch.optim.AdamW(model.parameters(), lr=4e-3)
        for step in range(120):
            batch = rows(16, seed=step)
            F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()).backward()
            adam.step()
            adam.zero_grad()
        made.add(model.save_pretrained(top / name), name)
    return made


def assembled(store, config, takes):
    return store.assemble(config, store.take(config, takes)), store.sources(config, takes)


def models_of(store):
    return {name: store.read(name) for name in WIDTHS}


BATCHES = [rows(16, seed=1000 + i)[:, :-1] for i in range(8)]


def test_fitted_maps_let_blocks_of_a_narrow_model_work_in_a_wide_one(store):
    """Held-out loss: a random stitch < one that adds nothing < the fitted one, which is near the whole model."""
    made, sources = assembled(store, STITCHED, TAKES)
    found = fit(made, sources, models_of(store), BATCHES)
    whole, nothing, fitted = loss(store.read("wide").model()), loss(made.model()), loss(found.saved.model())
    model = made.model()
    torch.manual_seed(0)
    model.layers[0].reset_own_parameters()
    assert nothing > whole + 0.5 and loss(model) > whole + 0.5
    assert fitted < whole + 0.25 * (nothing - whole)
    assert all(0.4 < share < 1 for share in found.explained["layers.0"])
    # nothing but the maps is new
    changed = {p for p, node in found.saved.nodes.items() if node is not made.nodes[p]}
    assert changed == {"layers.0"}


def test_the_whole_trunk_of_a_wide_model_between_the_ends_of_a_narrow_one(store):
    config = {"dim": 32, "vocab_size": 256, "trunk": [{"stitch": 48, "of": [{"repeat": 3, "of": LAYER}]}]}
    body = [f"layers.0.body.items.0.items.{i}=wide:layers.{i}" for i in range(3)]
    made, sources = assembled(store, config, ["tok_embeddings=narrow", "norm=narrow", *body])
    fitted = loss(fit(made, sources, models_of(store), BATCHES).saved.model())
    assert fitted < loss(store.read("narrow").model()) + 0.2 < loss(made.model())


def test_a_model_whose_own_layers_are_stitched_in_is_found_again(store):
    """Two stitches at the model's own width: every map is the identity, and the model says what it said."""
    trunk = [{"stitch": 48, "of": [LAYER]}, LAYER, {"stitch": 48, "of": [LAYER]}]
    takes = ["all=wide", *(f"layers.{i}.body.items.0=wide:layers.{i}" for i in (0, 2))]
    made, sources = assembled(store, {**STITCHED, "trunk": trunk}, takes)
    found = fit(made, sources, models_of(store), BATCHES, ridge=1e-9)
    model, tokens = found.saved.model(), BATCHES[0]
    for i in (0, 2):
        torch.testing.assert_close(model.layers[i].in_proj.weight, torch.eye(48), atol=0.01, rtol=0)
    expected = store.read("wide").model()(tokens)
    assert (model(tokens) - expected).norm() < 0.01 * expected.norm()
    assert all(share > 0.999 for shares in found.explained.values() for share in shares)


@pytest.mark.parametrize("ridge", [0.0, 0.1])
def test_the_regression_is_that_of_lstsq(ridge):
    """Sums over pieces of any size against the solution of the whole, ridge as further rows of it."""
    torch.manual_seed(1)
    x = torch.randn(200, 5).double() @ torch.randn(5, 5).double() + 3
    y = x @ torch.randn(5, 3).double() + torch.randn(200, 3).double() - 7
    regression, linear = _Regression(5, 3), torch.nn.Linear(5, 3).double()
    for part in (slice(0, 7), slice(7, 8), slice(8, 200)):
        regression.add(x[part][None], y[part][None])
    share = regression.solve(linear, ridge)
    a, b = x - x.mean(0), y - y.mean(0)
    small = (ridge * a.square().sum() / 5) ** 0.5 * torch.eye(5).double()
    wanted = torch.linalg.lstsq(torch.cat([a, small]), torch.cat([b, torch.zeros(5, 3).double()])).solution
    torch.testing.assert_close(linear.weight.T, wanted, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(linear(x).mean(0), y.mean(0), atol=1e-9, rtol=1e-9)
    left = (b - a @ wanted).square().sum() / b.square().sum()
    assert share == pytest.approx(1 - float(left), abs=1e-9)


def test_a_stored_stitch_is_taken_as_it_is(store, tmp_path):
    made, sources = assembled(store, STITCHED, TAKES)
    found = fit(made, sources, models_of(store), BATCHES[:2]).saved
    store = Store(tmp_path / "other")
    store.add(write(found, tmp_path / "found"), "found")
    config = {**STITCHED, "trunk": STITCHED["trunk"][:2]}
    again, taken = assembled(store, config, ["all=found"])
    assert "layers.0" in taken and fit(again, taken, {"found": store.read("found")}, []).explained == {}
    mine, theirs = (s.nodes["layers.0"].tensors for s in (again, found))
    assert all(torch.equal(t, theirs[n]) for n, t in mine.items()) and mine["in_proj.weight"].any()


def test_what_cannot_be_fitted_is_refused(store, tmp_path):
    def refused(said, config, takes, models=None):
        made, sources = assembled(store, config, takes)
        with pytest.raises(ConfigError, match=said):
            fit(made, sources, models or models_of(store), BATCHES[:1])

    models = models_of(store)
    files = {"tokenizer.json": b"{}"}
    refused("different tokenizers", STITCHED, TAKES, {**models, "narrow": replace(models["narrow"], files=files)})
    other = read_saved(zoo.build({"dim": 32, "vocab_size": 99, "trunk": [LAYER]}).save_pretrained(tmp_path))
    refused("narrow reads vocabulary 99", STITCHED, TAKES, {**models, "narrow": other})
    deep = {**STITCHED, "trunk": [{"stitch": 32, "of": [LAYER, {"stitch": 48, "of": [LAYER]}]}, LAYER, LAYER]}
    inner = ["layers.0.body.items.1.body.items.0=wide:layers.0"]
    refused(r"layers\.0.*holds another stitch", deep, [*TAKES, *inner])
    loop = {**STITCHED, "trunk": [{"loop": 2, "of": [{"stitch": 32, "of": [LAYER]}]}]}
    takes = ["tok_embeddings=wide", "norm=wide", "layers.0.body.items.0.body.items.0=narrow:layers.0"]
    refused("does not read every token once", loop, takes)
    bare = {**STITCHED, "trunk": [{"stitch": 32, "of": [LAYER]}], "final_norm": "none"}
    refused("no stored block stands in it and behind it", bare, ["tok_embeddings=wide", TAKES[1]])


def test_a_stitch_that_is_not_fitted_adds_nothing(store):
    made, _ = assembled(store, STITCHED, TAKES)
    model, x = made.model(), torch.randn(2, 5, 48)
    assert isinstance(model.layers[0], Stitch) and torch.equal(model.layers[0](x), x)
    with pytest.raises(ConfigError, match=r"all=wide: wide has no node layers\.0\.body\.items\.0\.items\.0"):
        store.take(STITCHED, ["all=wide"])
