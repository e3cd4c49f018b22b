import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.contract import positions_from
from zoo.errors import ConfigError, DataError
from zoo.sections import SYNTHETIC, DataSection
from zoo.train.corpus import Document, Stream
from zoo.train.loader import HeldoutRows, Loader, TaskRows, TrainRows, batch
from zoo.train.synthetic import IGNORE, make_task
from zoo.train.tokenizer import ByteTokenizer

TEXT = [Document(str(n), bytes((n + i) % 256 for i in range(size))) for n, size in enumerate((50, 3, 1, 120, 30))]


def stream():
    return Stream.of(TEXT, ByteTokenizer())


def test_a_row_is_a_window_and_its_shift():
    s = stream()
    rows = TrainRows(s, 16, seed=3)
    joined = s.ids.tolist()
    for i in range(40):
        row = rows.row(i)
        assert row.inputs[1:].tolist() == row.labels[:-1].tolist()
        window = [*row.inputs.tolist(), int(row.labels[-1])]
        assert any(joined[k : k + 17] == window for k in range(len(joined)))


def test_an_epoch_visits_every_window_once():
    rows = TrainRows(stream(), 16, seed=0)
    first = [tuple(rows.row(i).inputs) for i in range(rows.per_epoch)]
    second = [tuple(rows.row(rows.per_epoch + i).inputs) for i in range(rows.per_epoch)]
    assert len(set(first)) == rows.per_epoch and first != second
    assert tuple(TrainRows(stream(), 16, seed=1).row(0).inputs) != first[0]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 30), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]))
def test_rows_depend_on_the_global_index_only(start, world, size):
    """What n processes see in a step is what one process sees, from any position on."""
    rows = TrainRows(stream(), 16, seed=5)
    one = Loader(rows, size * world)
    one.load_state_dict({"rows": start})
    wanted = next(iter(one))
    parts = []
    for rank in range(world):
        loader = Loader(TrainRows(stream(), 16, seed=5), size, rank, world)
        loader.load_state_dict({"rows": start})
        parts.append(next(iter(loader)))
        assert loader.state_dict() == {"rows": start + size * world} == one.state_dict()
    assert torch.equal(torch.cat([p.inputs for p in parts]), wanted.inputs)
    assert torch.equal(torch.cat([p.labels for p in parts]), wanted.labels)


def test_resume_is_exact_across_epochs():
    rows = TrainRows(stream(), 16, seed=2)
    loader = Loader(rows, 3)
    it = iter(loader)
    whole = [next(it).inputs for _ in range(12)]
    again = Loader(rows, 3)
    again.load_state_dict({"rows": 15})
    for want, got in zip(whole[5:], iter(again), strict=False):
        assert torch.equal(want, got.inputs)


def test_document_ids_follow_the_documents():
    s = stream()
    part = batch(HeldoutRows(s, 16, doc_ids=True), 0, 4)
    assert part.doc_ids.dtype == torch.int64
    at_start = part.inputs == 256
    assert torch.equal(
        positions_from(part.doc_ids, 4, 16, torch.device("cpu")) == 0, at_start | (torch.arange(16) == 0)
    )
    flat = part.doc_ids.flatten()
    assert bool((flat[1:] >= flat[:-1]).all())


def test_heldout_rows_score_every_token_once():
    s = stream()
    for length in (5, 16, 1000):
        rows = HeldoutRows(s, length)
        part = batch(rows, 0, len(rows))
        assert part.labels[part.labels != IGNORE].tolist() == s.ids[1:].tolist()


def test_too_little_text():
    with pytest.raises(DataError, match=r"has 210 tokens; one row needs train.seq_len \+ 1 = 501"):
        TrainRows(stream(), 500, 0)
    assert len(TrainRows(stream(), 209, 0).row(7).inputs) == 209


@pytest.mark.parametrize("source", SYNTHETIC)
def test_tasks_are_reproducible_and_splits_differ(source):
    sample = make_task(DataSection(source=source, num_pairs=3, num_copied=3, num_items=3), 24, 16)
    a, b = batch(TaskRows(sample, 0), 10, 8), batch(TaskRows(sample, 0), 10, 8)
    assert torch.equal(a.inputs, b.inputs) and torch.equal(a.labels, b.labels)
    for other in (TaskRows(sample, 0, split=1), TaskRows(sample, 1)):
        assert not torch.equal(a.inputs, batch(other, 10, 8).inputs)
    assert a.inputs.min() >= 0 and a.inputs.max() < 16 and a.labels.max() < 16
    assert bool((a.labels != IGNORE).any(1).all())


def test_mqar_answers_are_the_bound_values():
    sample = make_task(DataSection(source="mqar", num_pairs=4), 40, 32)
    for index in range(50):
        inputs, labels, *_ = TaskRows(sample, 0).row(index)
        bound = dict(zip(inputs[0:8:2].tolist(), inputs[1:8:2].tolist(), strict=True))
        asked = np.flatnonzero(labels != IGNORE)
        assert len(bound) == 4 == len(asked) and asked.min() >= 8
        assert {int(inputs[i]): int(labels[i]) for i in asked} == bound
        assert all(1 <= k < 16 <= v for k, v in bound.items())


def test_selective_copy_and_induction_answers():
    sample = make_task(DataSection(source="selective_copy", num_copied=5), 20, 12)
    for index in range(20):
        inputs, labels, *_ = TaskRows(sample, 0).row(index)
        assert [t for t in inputs[:-5] if t > 1] == labels[-5:].tolist()
        assert set(inputs[-5:]) == {1} and set(labels[:-5]) == {IGNORE}
    sample = make_task(DataSection(source="induction"), 20, 12)
    for index in range(20):
        inputs, labels, *_ = TaskRows(sample, 0).row(index)
        first, last = np.flatnonzero(inputs == 0)
        assert last == 19 and labels[-1] == inputs[first + 1] and (labels != IGNORE).sum() == 1


def test_needle_answers_are_what_stands_behind_the_keys():
    sample = make_task(DataSection(source="needle", num_pairs=3), 12, 30)
    places = set()
    for index in range(50):
        inputs, labels, *_ = TaskRows(sample, 0).row(index)
        at = np.flatnonzero((inputs[:-3] >= 10) & (inputs[:-3] < 20))
        bound = {int(inputs[i]): int(inputs[i + 1]) for i in at}
        assert len(bound) == 3 and all(v >= 20 for v in bound.values()) and (inputs < 10).sum() == 3
        assert dict(zip(inputs[-3:].tolist(), labels[-3:].tolist(), strict=True)) == bound
        assert set(labels[:-3]) == {IGNORE}
        places.update(at.tolist())
    assert places == set(range(8))  # needles are two tokens wide and lie anywhere before the questions


def test_state_tracking_answers_where_every_item_is():
    """The items are moved by hand, in the order in which itertools numbers the permutations."""
    for items in (2, 3, 5):
        numbered = list(itertools.permutations(range(items)))
        sample = make_task(DataSection(source="state_tracking", num_items=items), 30, 120)
        for index in range(5):
            inputs, labels, *_ = TaskRows(sample, 0).row(index)
            places = list(range(items))
            for token, answer in zip(inputs.tolist(), labels.tolist(), strict=True):
                places = [numbered[token][p] for p in places]
                assert tuple(places) == numbered[answer]
    parity = make_task(DataSection(source="state_tracking", num_items=2), 30, 2)
    inputs, labels, *_ = TaskRows(parity, 0).row(0)
    assert labels.tolist() == (inputs.cumsum() % 2).tolist()


@pytest.mark.parametrize(
    ("data", "seq_len", "vocab", "words"),
    [
        ({"source": "mqar", "num_pairs": 8}, 31, 64, "train.seq_len: must be at least 32"),
        ({"source": "mqar", "num_pairs": 8}, 64, 17, "vocab_size: must be at least 18"),
        ({"source": "selective_copy", "num_copied": 8}, 15, 64, "train.seq_len: must be at least 16"),
        ({"source": "needle", "num_pairs": 8}, 23, 64, "train.seq_len: must be at least 24"),
        ({"source": "needle", "num_pairs": 8}, 64, 23, "vocab_size: must be at least 24"),
        ({"source": "state_tracking"}, 64, 119, "vocab_size: must be at least 120"),
        ({"source": "induction"}, 2, 64, "train.seq_len: must be at least 3"),
    ],
)
def test_rows_too_small_for_the_task(data, seq_len, vocab, words):
    with pytest.raises(ConfigError) as caught:
        make_task(DataSection(**data), seq_len, vocab)
    assert words in str(caught.value)
