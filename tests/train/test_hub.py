"""Hugging Face datasets, streamed from a folder of this machine: no network."""

import itertools
import json
import sys

import datasets
import numpy as np
import pytest
import torch

from zoo.errors import ConfigError, DataError
from zoo.sections import DataSection, TrainSection
from zoo.train import titan  # noqa: F401  binds the device before torchtitan is loaded
from zoo.train.hub import HubText
from zoo.train.prepare import prepare
from zoo.train.run import train
from zoo.train.titan_data import HubLoader
from zoo.train.tokenizer import ByteTokenizer

TEXTS = [f"file {f} record {i} " + "words " * (i % 7) for f in range(4) for i in range(40)]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dataset")
    for f in range(4):
        lines = [json.dumps({"text": t, "n": i}) for i, t in enumerate(TEXTS[40 * f : 40 * f + 40])]
        (folder / f"{f}.jsonl").write_text("\n".join([*lines, json.dumps({"text": "", "n": -1})]))
    return f"hf:{folder}"


def section(source, **more):
    return DataSection(source=source, heldout=0.15, heldout_bytes=10**6, **more)


def loader(source, rank=0, world=1, size=4):
    rows = HubText(section(source, doc_ids=True), ByteTokenizer()).rows(24, 0, True)
    given = {"dp_world_size": world, "dp_rank": rank, "seq_len": 24, "local_batch_size": size}
    return HubLoader(HubLoader.Config(rows=rows, with_labels=False), **given, tokenizer=None)


def texts(batches):
    ids = torch.cat([b[0]["input"] for b in batches]).flatten()
    return [bytes(d[1:].tolist()).decode() for d in np.split(ids.numpy(), np.flatnonzero(ids.numpy() == 256))[1:-1]]


def test_every_text_is_trained_on_or_held_out(source):
    text = HubText(section(source), ByteTokenizer())
    heldout = [d.text.decode() for d in text.documents]
    assert 10 < len(heldout) < 40 and len(set(heldout)) == len(heldout)
    trained = [t for t in TEXTS if t not in heldout]
    assert [d.text.decode() for d in text.trained] == trained
    found = texts(itertools.islice(loader(source), 50))
    assert found[: len(trained)] == trained and set(found[len(trained) :]) <= set(trained)
    assert text.heldout(100).size == 100 and text.summary()["heldout_documents"] == len(heldout)


def test_ranks_read_different_texts_and_none_that_is_held_out(source):
    heldout = {d.text.decode() for d in HubText(section(source), ByteTokenizer()).documents}
    found = [texts(itertools.islice(loader(source, rank, 2), 60)) for rank in range(2)]
    assert not set(found[0][:60]) & set(found[1][:60])  # a later epoch has the files in another order
    assert set(found[0]) | set(found[1]) == set(TEXTS) - heldout


def test_labels_are_the_next_tokens_and_documents_are_told_apart(source):
    for given, labels in itertools.islice(loader(source), 8):
        inputs, ids = given["input"], given["doc_ids"]
        same = ids[:, 1:] == ids[:, :-1]
        assert torch.equal(inputs[:, 1:][same], labels[:, :-1][same])
        assert bool((labels[:, :-1][~same] == 256).all()) and bool((inputs[:, 1:][~same] == 256).all())
        assert bool((ids[:, 0] == 1).all()) and bool((~same).any())


def test_a_stream_goes_on_where_it_was(source):
    whole = list(itertools.islice(loader(source), 40))
    for stop in (1, 7, 33):
        first = loader(source)
        list(itertools.islice(first, stop))
        again = loader(source)
        again.load_state_dict(first.state_dict())
        for (a, x), (b, y) in zip(whole[stop : stop + 5], again, strict=False):
            assert torch.equal(a["input"], b["input"]) and torch.equal(a["doc_ids"], b["doc_ids"]) and torch.equal(x, y)
    with pytest.raises(
        ConfigError, match="was read by 1 data ranks: a streamed dataset goes on with as many, not with 2"
    ):
        loader(source, world=2).load_state_dict(first.state_dict())


def test_a_run_is_resumed_to_the_same_numbers(source, tmp_path):
    document = {
        "name": "tiny",
        "dim": 16,
        "vocab_size": 257,
        "trunk": ["swiglu"],
        "train": {"steps": 6, "batch_size": 2, "seq_len": 24, "checkpoint_every": 3, "eval_every": 0}
        | {"warmup_steps": 0, "min_lr_factor": 1.0},
        "data": {"source": source, "heldout": 0.15, "doc_ids": True},
    }
    whole = train(document, progress=False)
    train(document, out=tmp_path / "run", steps=3, progress=False)
    resumed = train(tmp_path / "run", out=tmp_path / "run", steps=6, resume=True, progress=False)
    assert resumed.loss == whole.loss and resumed.evaluation == whole.evaluation
    assert resumed.evaluation["bits_per_byte"] > 0


def test_what_cannot_be_read_is_told_in_one_line(source, tmp_path, monkeypatch):
    def told(data):
        with pytest.raises(DataError) as caught:
            HubText(data, ByteTokenizer())
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "has no column 'txt'; did you mean text?" in told(section(source, text_key="txt"))
    assert "hf:/no/where: cannot be read: Couldn't find any data file" in told(section("hf:/no/where"))
    few = DataSection(source=source, heldout=1e-9)
    assert "no text of it is held out at data.heldout 1e-09" in told(few)

    def offline(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'some/name' on the Hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    assert told(section("hf:some/name")) == (
        "hf:some/name: cannot be read: Couldn't reach 'some/name' on the Hub "
        "(is there a network, and is the name right?)"
    )
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "needs the package `datasets`" in told(section("hf:some/name"))


def test_a_stream_is_no_source_of_a_mixture_and_of_noise(source):
    with pytest.raises(ConfigError, match=r"mix\[0\].source: must name text"):
        DataSection.from_mapping({"mix": [{"source": source}]})
    wanted = {"block diffusion": {"diffusion": {"block_size": 8}}, "a prefix": {"prefix": 8}}
    for what, more in wanted.items():
        with pytest.raises(ConfigError, match=f"a streamed dataset has no rows for {what}"):
            prepare(section(source), TrainSection(seq_len=24), {"vocab_size": 258} | more, None)
