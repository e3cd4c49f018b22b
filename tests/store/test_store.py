"""The store: nodes kept once, models back bit for bit, damage found, comparison, assembly."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import zoo
from zoo.errors import ConfigError, DataError, ZooError
from zoo.store import Store, compare, read_saved

LAYER = [{"attention": {"num_heads": 2}}, {"swiglu": {"hidden_dim": 48}}]
SMALL = {"name": "small", "dim": 32, "vocab_size": 40, "trunk": [{"repeat": 2, "of": LAYER}]}
CONFIGS = sorted(p.stem for p in (Path(zoo.__file__).parent / "configs").glob("*_small.yaml"))


def changed(folder: Path, out: Path, name: str, by: float = 0.1) -> Path:
    """The saved model with one tensor moved."""
    model = zoo.from_pretrained(folder)
    with torch.no_grad():
        model.get_parameter(name).add_(by)
    return model.save_pretrained(out)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """A model and a copy whose last feed-forward network was trained on."""
    top = tmp_path_factory.mktemp("models")
    base = zoo.build(SMALL, seed=1).save_pretrained(top / "base")
    (base / "tokenizer.json").write_text("{}")
    (base / "LICENSE").write_text("as you like")
    return base, changed(base, top / "tuned", "layers.1.items.1.block.down_proj.weight")


@pytest.fixture
def store(folders, tmp_path) -> Store:
    store = Store(tmp_path / "store")
    store.add(folders[0], "base")
    store.add(folders[1], "tuned")
    return store


def test_equal_nodes_are_kept_once(folders, tmp_path):
    store = Store(tmp_path / "store")
    first, second = store.add(folders[0]), store.add(folders[1], "tuned")
    assert (first.name, first.nodes, first.shared) == ("small", 6, 0)  # embedding, 2 x 2 blocks, norm
    assert (second.nodes, second.shared) == (6, 5)
    assert first.bytes == sum(p.numel() * 4 for p in zoo.from_pretrained(folders[0]).parameters())
    assert second.bytes - second.saved_bytes == (3 * 32 * 48 + 32) * 4
    assert len(list((tmp_path / "store" / "objects").iterdir())) == 7
    assert store.names() == ["small", "tuned"]
    again = store.add(folders[0])
    assert again.shared == again.nodes and again.saved_bytes == again.bytes


def test_models_come_back_bit_for_bit(store, folders, tmp_path):
    for name, folder in zip(("base", "tuned"), folders):
        back = store.get(name, tmp_path / name)
        assert sorted(p.name for p in back.iterdir()) == sorted(p.name for p in folder.iterdir())
        for path in folder.iterdir():
            assert (back / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("config", ["hydra_small", "zamba2_small", "vit_small", "hnet_small", "mor_small"])
def test_any_graph_comes_back(config, tmp_path):
    """Shared blocks, combinators with parameters of their own, routers, other widths inside, patches."""
    folder = zoo.build(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "in")
    store = Store(tmp_path / "store")
    made = store.add(folder)
    back = store.get(made.name, tmp_path / "out")
    assert (back / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert (back / "config.yaml").read_bytes() == (folder / "config.yaml").read_bytes()


@pytest.mark.parametrize("config", CONFIGS)
def test_every_node_is_described(config):
    """Each tensor belongs to one node, and building again gives the same description."""
    from zoo.architectures.storage import unique_tensors
    from zoo.store.nodes import nodes_of

    model = zoo.build(config, device="meta")
    nodes = nodes_of(model)
    assert {f"{path}.{n}" for path, node in nodes.items() for n in node.tensors} == set(unique_tensors(model))
    again = nodes_of(zoo.build(model.config, device="meta"))
    assert {p: n.likeness for p, n in nodes.items()} == {p: n.likeness for p, n in again.items()}


def test_options_left_out_are_their_defaults(tmp_path):
    """A block is the same whether a default is written or not, and another where an option differs."""
    from zoo.store.nodes import nodes_of

    def likeness(**options):
        trunk = [{"attention": {"num_heads": 2, **options}}]
        return nodes_of(zoo.build({**SMALL, "trunk": trunk}, device="meta"))["layers.0"].likeness

    assert likeness() == likeness(causal=True)
    assert likeness() != likeness(window=8)


def test_damage_is_found_and_mended(store, folders, tmp_path):
    place = "layers.1.items.1"
    path = store.folder / "objects" / f"{store.manifest('base')['nodes'][place]['object']}.safetensors"
    whole = bytearray(path.read_bytes())
    whole[-3] ^= 1
    path.write_bytes(whole)
    with pytest.raises(DataError, match=rf"{path.name} \({place}\) is damaged: what it holds has another hash"):
        store.get("base", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    store.get("tuned", tmp_path / "tuned")  # does not use it
    path.write_bytes(whole[:100])
    with pytest.raises(DataError, match="is damaged"):
        store.read("base")
    assert store.add(folders[0], "base").shared == 5  # written anew
    store.read("base")
    path.unlink()
    with pytest.raises(DataError, match="is missing from the store"):
        store.read("base")


def test_damaged_files_and_manifests(store, tmp_path):
    (store.folder / "files" / store.manifest("base")["files"]["LICENSE"]).write_text("mine")
    with pytest.raises(DataError, match=r"\(LICENSE\) is damaged"):
        store.read("base")
    path = store.folder / "models" / "base.json"
    good = path.read_text()
    for bad in ("", "[]", "{}", good.replace('"LICENSE"', '"../LICENSE"'), good.replace('"object": "', '"object": "x')):
        path.write_text(bad)
        with pytest.raises(DataError, match=r"base\.json is damaged"):
            store.read("base")


def test_requests_that_are_refused(store, folders, tmp_path):
    with pytest.raises(ConfigError, match="another model named 'base': give a --name"):
        store.add(folders[1], "base")
    assert store.add(folders[0], "modèle-1").name in store.names()
    with pytest.raises(ConfigError, match=r"'\.\./base' is no name"):
        store.add(folders[0], "../base")
    with pytest.raises(ConfigError, match="no model 'bas' in this store; did you mean base"):
        store.read("bas")
    with pytest.raises(ConfigError, match="is not an empty folder"):
        store.get("base", folders[0])
    with pytest.raises(ConfigError, match=r"there is no config\.yaml"):
        store.add(tmp_path)
    with pytest.raises(ZooError, match="cannot write"):
        Store("/proc/nowhere").add(folders[0])


def test_an_interrupted_write_leaves_no_object(folders, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("zoo.store.store.save_file", full)
    with pytest.raises(ZooError, match="No space left"):
        Store(tmp_path).add(folders[0])
    assert not list((tmp_path / "objects").iterdir()) and not Store(tmp_path).names()


# ------------------------------------------------------------------------------------------- comparison
def test_compare_names_the_node_and_the_layer_that_differ(folders):
    a, b = map(read_saved, folders)
    found = compare(a, b)
    assert not found.equal
    how = {n.node: n.how for n in found.nodes}
    assert how.pop("layers.1.items.1") == "weights" and set(how.values()) == {"equal"}
    (moved,) = (n for n in found.nodes if n.how == "weights")
    weights = torch.cat([t.flatten() for t in a.nodes[moved.node].tensors.values()])
    assert moved.distance == pytest.approx(0.1 * (32 * 48) ** 0.5 / float(weights.norm()), rel=1e-4)
    streams = {s.where: s for s in found.streams}
    assert list(streams) == ["embedding", "layers.0", "layers.1", "output"]
    assert streams["layers.0"].relative == 0 and streams["layers.0"].cosine == pytest.approx(1)
    assert streams["layers.1"].relative > 0 and streams["output"].cosine < 1
    same = compare(a, a)
    assert same.equal and all(s.relative == 0 for s in same.streams)
    assert "layers.1.items.1 swiglu: weights" in str(found)


@pytest.mark.parametrize("config", ["prefix_small", "hydra_small", "bd3_small", "huginn_small", "vit_small"])
def test_streams_are_those_of_the_model(config, tmp_path):
    """The last stream is what the model says, and every model equals itself."""
    from zoo.store.compare import _inputs, _streams

    saved = read_saved(zoo.build(config).save_pretrained(tmp_path))
    model, inputs = saved.model(), _inputs(saved.graph, 1, 32, 0)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        expected = model(inputs)
    assert torch.equal(dict(_streams(model, inputs, 0))["output"], expected)
    assert compare(saved, saved, rows=1, tokens=32).equal


def test_compare_tells_other_blocks_widths_and_depths(folders, tmp_path):
    def saved(name, **given):
        return read_saved(zoo.build({**SMALL, **given}).save_pretrained(tmp_path / name))

    base = read_saved(folders[0])
    other = saved("other", trunk=[[{"gla": {"num_heads": 2}}, LAYER[1]]])
    found = {n.node: n for n in compare(base, other).nodes}
    assert found["layers.0.items.0"].why == "attention of width 32 against gla of width 32"
    assert found["layers.1.items.0"].how == "only a"
    heads = saved("heads", trunk=[[{"attention": {"num_heads": 4}}, LAYER[1]]])
    found = {n.node: n for n in compare(base, heads).nodes}
    assert "num_heads (2 against 4)" in found["layers.0.items.0"].why
    wide = compare(base, saved("wide", dim=64))
    assert wide.nodes[1].why == "attention of width 32 against attention of width 64"
    assert [s.relative for s in wide.streams[:-1]] == [None, None, None] and wide.streams[-1].relative > 0
    words = compare(base, saved("words", vocab_size=41))
    assert words.why == "outputs cannot be compared: vocabulary 40 against vocabulary 41" and not words.equal


# --------------------------------------------------------------------------------------------- assembly
def test_a_model_of_stored_blocks(store, folders):
    """The tuned model again, put together from the other one and one node."""
    takes = ["all=base", "layers.1.items.1=tuned"]
    made = store.assemble(SMALL, store.take(SMALL, takes))
    tokens = torch.randint(40, (1, 9))
    assert torch.equal(made.model()(tokens), zoo.from_pretrained(folders[1])(tokens))
    deep = {**SMALL, "trunk": [{"repeat": 3, "of": LAYER}]}
    nodes = store.take(deep, ["tok_embeddings=base", "norm=base", *(f"layers.{i}=tuned:layers.1" for i in range(3))])
    # where a block stands does not matter to those that do not ask for their depth
    model = store.assemble(deep, nodes).model()
    for layer in model.layers:
        expected = zoo.from_pretrained(folders[1]).layers[1].state_dict()
        assert all(torch.equal(t, expected[n]) for n, t in layer.state_dict().items())


def test_assembly_refuses_by_name(store, tmp_path):
    nodes = store.take(SMALL, ["all=base"])
    with pytest.raises(ConfigError, match=r"no stored block is named for layers\.1\.items\.0, layers\.1\.items\.1"):
        store.assemble(SMALL, {p: h for p, h in nodes.items() if not p.startswith("layers.1")})
    with pytest.raises(ConfigError) as error:
        store.assemble({**SMALL, "dim": 64}, nodes)
    assert len(error.value.problems) == 6
    assert "attention of width 64 against attention of width 32" in str(error.value)
    with pytest.raises(ConfigError, match=r"layers\.7.*is no node"):
        store.assemble(SMALL, {**nodes, "layers.7": nodes["norm"]})
    with pytest.raises(ConfigError, match="is no hash"):
        store.assemble(SMALL, {**nodes, "norm": "../../etc"})
    for take, said in (
        ("layers.0", "is not NODE=MODEL"),
        ("layers.9=base", "there is no node layers.9"),
        ("layers.0=base:layers.9", "base has no node layers.9.items.0"),
        ("all=nobody", "no model 'nobody'"),
    ):
        with pytest.raises(ConfigError, match=said):
            store.take(SMALL, [take])


def test_licences_go_along(tmp_path):
    store = Store(tmp_path / "store")
    for name, license in (("one", "mit"), ("two", "apache-2.0")):
        config = {**SMALL, "name": name, "origin": {"license": license}}
        store.add(zoo.build(config, seed=len(name + license)).save_pretrained(tmp_path / name))
    made = store.assemble(SMALL, store.take(SMALL, ["all=one", "layers.0=two"]))
    assert made.graph.document["origin"]["license"] == "apache-2.0 AND mit"
    assert "apache-2.0 AND mit" in made.config
    alone = store.assemble(SMALL, store.take(SMALL, ["all=one"]))
    assert alone.graph.document["origin"]["license"] == "mit"
