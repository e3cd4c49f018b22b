"""Rows of several sources: the proportions, and what a mixture is told and judged by."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import zoo
from zoo.errors import ConfigError
from zoo.sections import DataSection, TrainSection
from zoo.train.loader import Loader, Row, batch
from zoo.train.mixture import MixedRows
from zoo.train.prepare import prepare
from zoo.train.progress import Reporter
from zoo.train.tokenize import prepare_tokens

WEIGHTS = st.lists(st.sampled_from([0.1, 0.25, 0.3, 0.7, 1, 1.5, 2, 1 / 3, 100, 0.001]), min_size=1, max_size=5)


class Numbered:
    """Row i of source n says so."""

    def __init__(self, number):
        self.number = number

    def row(self, index):
        return Row(np.array([self.number, index]), np.array([index, 0]))


def mixed(weights, seed=0):
    return MixedRows([Numbered(n) for n in range(len(weights))], weights, seed)


@settings(max_examples=60, deadline=None)
@given(WEIGHTS, st.integers(0, 10**12), st.integers(1, 400), st.integers(0, 9))
def test_every_window_has_its_shares_and_no_row_is_left_out(weights, start, length, seed):
    rows = mixed(weights, seed)
    found = [rows.source(i) for i in range(start, start + length)]
    for number, weight in enumerate(weights):
        inside = [index for n, index in found if n == number]
        assert abs(len(inside) - length * weight / sum(weights)) < len(weights)
        assert inside == list(range(inside[0], inside[0] + len(inside))) if inside else True


def test_sources_begin_at_their_first_row_and_the_seed_moves_the_pattern():
    for seed in range(5):
        found = [mixed([0.7, 0.2, 0.1], seed).source(i) for i in range(100)]
        for number in range(3):
            assert next(i for n, i in found if n == number) == 0
    patterns = {tuple(mixed([0.7, 0.2, 0.1], seed).source(i)[0] for i in range(30)) for seed in range(20)}
    assert len(patterns) > 5
    assert [n for n, _ in (mixed([1, 1]).source(i) for i in range(4))] in ([0, 1, 0, 1], [1, 0, 1, 0])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**9), st.sampled_from([1, 2, 4]), st.sampled_from([1, 3]))
def test_mixtures_are_the_same_on_any_number_of_processes(start, world, size):
    one = Loader(mixed([0.6, 0.4]), size * world)
    one.load_state_dict({"rows": start})
    parts = []
    for rank in range(world):
        loader = Loader(mixed([0.6, 0.4]), size, rank, world)
        loader.load_state_dict({"rows": start})
        parts.append(next(iter(loader)).inputs)
    assert torch.equal(torch.cat(parts), next(iter(one)).inputs)


@pytest.fixture
def sources(tmp_path):
    (tmp_path / "low.txt").write_text("".join(f"abc {i}\n" for i in range(800)))
    (tmp_path / "up.txt").write_text("".join(f"XYZ {i}\n" for i in range(800)))
    prepare_tokens(str(tmp_path / "up.txt"), tmp_path / "up", part_bytes=1000)
    return [{"source": str(tmp_path / "low.txt"), "weight": 3}, {"source": str(tmp_path / "up"), "weight": 1}]


def test_a_mixture_of_text_and_prepared_tokens_is_trained_and_judged_by_source(sources):
    section = TrainSection(seq_len=16, batch_size=4, eval_batches=2)
    data = DataSection(mix=tuple(sources), doc_ids=True, heldout_bytes=200)
    document = {"name": "m", "dim": 16, "vocab_size": 257, "trunk": ["swiglu"]}
    made = prepare(data, section, document, None)
    part = batch(made.rows, 0, 40)
    upper = ((part.inputs >= ord("X")) & (part.inputs <= ord("Z"))).any(1)
    assert int(upper.sum()) == 10 and part.doc_ids is not None
    assert set(made.summary) == {"low", "up"} and made.summary["low"]["share"] == 0.75
    model = zoo.build(document)
    glance = made.glance(model)
    assert set(glance) == {
        *("heldout_loss", "heldout_bits_per_byte"),
        *(f"heldout_{figure}_{source}" for source in ("low", "up") for figure in ("loss", "bits_per_byte")),
    }
    mean = 0.75 * glance["heldout_loss_low"] + 0.25 * glance["heldout_loss_up"]
    assert glance["heldout_loss"] == pytest.approx(mean)
    figures = made.judge(model, Reporter(False))
    assert figures["heldout_bytes"] == 400 and figures["low_heldout_bytes"] == figures["up_heldout_bytes"] == 200
    assert figures["bits_per_byte"] == pytest.approx(
        0.75 * figures["low_bits_per_byte"] + 0.25 * figures["up_bits_per_byte"]
    )
    assert len(figures) == 24
    assert "abc" in made.sample(model)


def test_sources_of_one_name_are_told_apart(sources, tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "low.jsonl").write_text('{"body": "some text of a record"}\n' * 30)
    more = {"source": str(tmp_path / "b" / "low.jsonl"), "text_key": "body"}
    data = DataSection(mix=(*sources, more))
    document = {"name": "m", "dim": 16, "vocab_size": 257, "trunk": ["swiglu"]}
    made = prepare(data, TrainSection(seq_len=16, batch_size=4), document, None)
    assert list(made.summary) == ["low", "up", "low-3"]


def test_wrong_mixtures_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        DataSection.from_mapping(
            {"source": "a.txt", "mix": [{"sorce": "b"}, {"source": "mqar"}, {"source": "c", "weight": 0}]}
        )
    text = str(caught.value)
    assert "data.source: goes with one source" in text and "mix[0].sorce: unknown option; did you mean source?" in text
    assert "mix[1].source: must name text" in text and "mix[2].weight: must be greater than 0" in text
    with pytest.raises(ConfigError, match=r"data.mix\[1\].weight: must be greater than 0"):
        zoo.load_config(
            {
                "dim": 16,
                "vocab_size": 9,
                "trunk": ["swiglu"],
                "data": {"mix": [{"source": "a"}, {"source": "b", "weight": -1}]},
            }
        )
