"""Tokens prepared on disk: what is written, going on after a kill, reading by memory map, what is refused."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from zoo.errors import ConfigError, DataError
from zoo.sections import DataSection
from zoo.train import tokenize
from zoo.train.corpus import Document, Stream, read_corpus
from zoo.train.evaluate import evaluate_text
from zoo.train.loader import HeldoutRows, Loader, TrainRows, batch
from zoo.train.permute import Permutation
from zoo.train.texts import MemoryText, PreparedText, open_text
from zoo.train.tokenize import prepare_tokens
from zoo.train.tokenizer import ByteTokenizer, load_tokenizer
from zoo.train.tokens import Prepared, is_prepared

PART = 4000


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Plain texts of many sizes, JSON lines and a parquet file of several row groups."""
    folder = tmp_path_factory.mktemp("source")
    rng = np.random.default_rng(0)
    for i in range(12):
        words = rng.choice(["alpha", "beta", "gamma\n", "dél\n"], int(rng.integers(5, 900)))
        (folder / f"{i:02}.txt").write_text(f"text {i} " + " ".join(words))
    (folder / "long.txt").write_text("".join(f"line {i}\n" for i in range(2000)))
    rows = [{"text": f"record {i} " * int(rng.integers(1, 30))} for i in range(150)]
    (folder / "x.jsonl").write_text("\n".join(map(json.dumps, rows[:75])) + "\n\n")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[75:]), folder / "y.parquet", row_group_size=20)
    (folder / "z.bin").write_bytes(b"\0\1")
    return folder


@pytest.fixture(scope="module")
def made(source, tmp_path_factory):
    return prepare_tokens(str(source), tmp_path_factory.mktemp("out") / "p", part_bytes=PART)


class Even(torch.nn.Module):
    """Holds every one of 70002 tokens for equally likely."""

    def __init__(self):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.zeros(70002))

    def forward(self, tokens):
        return self.logits.expand(*tokens.shape, -1)


def documents(stream):
    ids = stream.window(0, len(stream))
    assert ids[0] == ids[-1] == 256
    return [bytes(part[1:].tolist()) for part in np.split(ids[:-1], np.flatnonzero(ids[:-1] == 256))[1:]]


def hashes(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_every_document_is_there_once_and_split_by_its_name(source, made):
    corpus = read_corpus(DataSection(source=str(source)))
    train, heldout = documents(made.split("train")), documents(made.split("heldout"))
    wanted = sorted(d.text for d in (*corpus.train, *corpus.heldout))
    assert sorted(train + heldout) == wanted
    assert len(made.shards["train"]) > 5 and made.index["skipped_files"] == 1
    records = [d for d in heldout if d.startswith(b"record")]
    assert 1 <= len(records) <= 25 and any(not d.startswith(b"record") for d in heldout)
    summary = made.summary()
    assert summary["train_bytes"] == sum(map(len, train)) and summary["heldout_documents"] == len(heldout)
    assert not any(p.name.startswith((".", "part-", "plan")) for p in made.folder.iterdir())


def test_plain_texts_are_held_out_as_in_memory(source, tmp_path):
    for path in source.glob("*.txt"):
        (tmp_path / "s").mkdir(exist_ok=True)
        (tmp_path / "s" / path.name).write_bytes(path.read_bytes())
    corpus = read_corpus(DataSection(source=str(tmp_path / "s"), heldout=0.2))
    made = prepare_tokens(str(tmp_path / "s"), tmp_path / "p", heldout=0.2, part_bytes=PART)
    assert sorted(documents(made.split("heldout"))) == sorted(d.text for d in corpus.heldout)


def test_one_text_is_the_stream_that_memory_holds_and_is_judged_alike(source, tmp_path):
    """Its tail is held out; the model sees the same rows and gets the same figures, whole and cut."""
    data = DataSection(source=str(source / "long.txt"), heldout=0.1)
    memory = open_text(data, ByteTokenizer())
    made = prepare_tokens(data.source, tmp_path / "p", heldout=0.1, part_bytes=PART)
    mapped = open_text(DataSection(source=str(tmp_path / "p")), ByteTokenizer())
    assert isinstance(memory, MemoryText) and isinstance(mapped, PreparedText)
    assert len(made.shards["train"]) > 3
    assert np.array_equal(memory.train.window(0, len(memory.train)), mapped.train.window(0, len(mapped.train)))
    model = torch.nn.Embedding(257, 257)
    for limit in (10**6, 300):
        figures = [evaluate_text(model, t, seq_len=16, batch_size=4, limit=limit) for t in (memory, mapped)]
        assert figures[0] == figures[1]
    for seq_len in (7, 64):
        rows = [TrainRows(t.train, seq_len, 3, doc_ids=True) for t in (memory, mapped)]
        for i in (0, 5, 10**6):
            assert all(np.array_equal(a, b) for a, b in zip(rows[0].row(i)[:3], rows[1].row(i)[:3], strict=True))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_windows_and_documents_of_a_map_are_those_of_the_joined_stream(made, data):
    mapped = made.split("train")
    joined = Stream.of([Document("", d) for d in documents(mapped)], ByteTokenizer())
    assert len(joined) == len(mapped)
    start = data.draw(st.integers(0, len(mapped) - 1))
    stop = data.draw(st.integers(start + 1, start + 3 * PART))
    assert np.array_equal(mapped.window(start, stop), joined.window(start, stop))
    assert np.array_equal(mapped.documents(start, stop), joined.documents(start, stop))


def test_prefix_ends_behind_the_document_that_passes_the_limit(made):
    mapped = made.split("heldout")
    found = documents(mapped)
    for limit in (1, 500, 3000, 10**9):
        starts, sizes, stop = mapped.prefix(limit)
        assert sizes == [len(d) for d in found[: len(sizes)]]
        assert sum(sizes[:-1]) < limit <= sum(sizes) or len(sizes) == len(found)
        assert (
            mapped.window(0, stop).tolist()
            == Stream.of([Document("", d) for d in found[: len(sizes)]], ByteTokenizer()).ids[:-1].tolist()
        )
        assert [int(mapped.window(s, s + 1)[0]) for s in starts] == [256] * len(starts)
        judged = PreparedText(made, ByteTokenizer(), "bytes").heldout(limit)
        assert judged.size == sum(len(d.text) for d in judged.documents) == min(limit, sum(map(len, found)))


def test_processes_and_interruptions_do_not_show(source, made, tmp_path, monkeypatch):
    several = prepare_tokens(str(source), tmp_path / "w", workers=2, part_bytes=PART)
    assert hashes(several.folder) == hashes(made.folder)
    whole = tokenize._write_part
    left = iter(range(4))

    def stops(number, advance):
        if next(left, None) is None:
            raise RuntimeError
        whole(number, advance)

    monkeypatch.setattr(tokenize, "_write_part", stops)
    with pytest.raises(RuntimeError):
        prepare_tokens(str(source), tmp_path / "i", part_bytes=PART)
    done = {p: p.stat().st_mtime_ns for p in (tmp_path / "i").glob("train-*")}
    assert is_prepared(str(tmp_path / "i"))
    with pytest.raises(DataError, match="is not finished; run the same"):
        Prepared(tmp_path / "i")
    with pytest.raises(ConfigError, match="holds a part of other tokens"):
        prepare_tokens(str(source), tmp_path / "i", heldout=0.5, part_bytes=PART)
    monkeypatch.setattr(tokenize, "_write_part", whole)
    prepare_tokens(str(source), tmp_path / "i", part_bytes=PART)
    assert done and all(p.stat().st_mtime_ns == t for p, t in done.items())  # finished parts were kept
    assert hashes(tmp_path / "i") == hashes(made.folder)


def test_killed_processes_leave_what_can_be_gone_on_with(source, made, tmp_path):
    slow = (
        "import sys, time; from pathlib import Path; from zoo.train import tokenize as t; whole = t.pieces\n"
        "def pieces(*a):\n    for p in whole(*a):\n        time.sleep(0.01); yield p\n"
        f"t.pieces = pieces; t.prepare_tokens(sys.argv[1], Path(sys.argv[2]), part_bytes={PART})"
    )
    out = tmp_path / "p"
    for parts in (1, 3, 4):
        process = subprocess.Popen([sys.executable, "-c", slow, str(source), str(out)])
        for _ in range(2000):
            if len(list(out.glob("part-*.json"))) >= parts:
                break
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    prepare_tokens(str(source), out, part_bytes=PART)
    assert hashes(out) == hashes(made.folder)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**7), st.sampled_from([1, 2, 4]), st.sampled_from([1, 3]))
def test_mapped_rows_are_the_same_on_any_number_of_processes(made, start, world, size):
    rows = TrainRows(made.split("train"), 32, seed=5, doc_ids=True)
    one = Loader(rows, size * world)
    one.load_state_dict({"rows": start})
    wanted = next(iter(one))
    parts = []
    for rank in range(world):
        loader = Loader(TrainRows(made.split("train"), 32, seed=5, doc_ids=True), size, rank, world)
        loader.load_state_dict({"rows": start})
        parts.append(next(iter(loader)))
        assert loader.state_dict() == one.state_dict()
    for field in ("inputs", "labels", "doc_ids"):
        assert torch.equal(torch.cat([getattr(p, field) for p in parts]), getattr(wanted, field))


def test_packed_rows_of_a_map_tell_documents_apart(made):
    mapped = made.split("train")
    part = batch(HeldoutRows(mapped, 64, doc_ids=True), 0, -(-(len(mapped) - 1) // 64))
    flat, ids = part.doc_ids.flatten(), part.inputs.flatten()
    count = len(documents(mapped))
    assert flat[0] == 1 and flat.max() == count
    first = torch.cat([torch.tensor([True]), flat[1:] != flat[:-1]])
    assert torch.equal(first[: len(mapped) - 1], (ids == 256)[: len(mapped) - 1])


def test_a_tokenizer_from_a_file_is_kept_and_asked_for(source, tmp_path):
    words = Tokenizer(models.WordLevel({"alpha": 0, "beta": 1, "record": 70000, "?": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "t.json"))
    made = prepare_tokens(str(source), tmp_path / "p", tokenizer=str(tmp_path / "t.json"), part_bytes=PART)
    kept = tmp_path / "p" / "tokenizer.json"
    assert made.dtype == np.uint32 and made.index["tokenizer"]["end"] == 70001
    with pytest.raises(
        DataError, match=f"was made by the tokenizer .*t.json, not by bytes; set data.tokenizer: {kept}"
    ):
        open_text(DataSection(source=str(tmp_path / "p")), ByteTokenizer())
    text = open_text(DataSection(source=str(tmp_path / "p"), tokenizer=str(kept)), load_tokenizer(str(kept)))
    ids = text.train.window(0, len(text.train))
    assert ids[0] == ids[-1] == 70001 and {0, 1, 70000} <= set(ids.tolist())
    figures = evaluate_text(Even(), text, seq_len=16, batch_size=2, limit=400)
    paid = figures["heldout_tokens"] * math.log2(70002) / figures["heldout_bytes"]
    assert figures["bits_per_byte"] == pytest.approx(paid, rel=1e-5)


def test_damaged_folders_are_told_in_one_line(made, tmp_path):
    def copy(name):
        for path in made.folder.iterdir():
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / path.name).write_bytes(path.read_bytes())
        return tmp_path / name

    good = copy("good")
    told = []
    Prepared(good).check(told.append)
    assert told[-1] == sum(size for _, size, _ in made.files())
    short = copy("short") / "train-00001.bin"
    short.write_bytes(short.read_bytes()[:-2])
    with pytest.raises(
        DataError, match=r"train-00001.bin: has \d+ bytes, not \d+; remove .*short and prepare it again"
    ):
        Prepared(tmp_path / "short").split("train")
    Prepared(tmp_path / "short").split("heldout")
    wrong = copy("wrong") / "train-00002.bin"
    wrong.write_bytes(b"xx" + wrong.read_bytes()[2:])
    with pytest.raises(DataError, match=r"train-00002\.bin: is not what was written"):
        Prepared(tmp_path / "wrong").check()
    gone = copy("gone")
    stream = Prepared(gone).split("train")
    (gone / "train-00000.bin").unlink()
    with pytest.raises(DataError, match=r"train-00000\.bin: cannot be read: No such file") as caught:
        TrainRows(stream, 5000, 0).row(0)  # the file vanishes while a run goes on
        stream.window(0, 9)
    assert "\n" not in str(caught.value)
    (copy("index") / "index.json").write_text("{}")
    with pytest.raises(DataError, match="is not an index of prepared tokens"):
        Prepared(tmp_path / "index")
    (copy("format") / "index.json").write_text('{"format": 9}')
    with pytest.raises(DataError, match="is of format 9"):
        Prepared(tmp_path / "format")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"a.bin": b"a\0b", "b.bin": b"\0"}, "there is no text in it (2 binary files)"),
        ({"a.txt": b""}, "there is no text in it"),
        ({"a.txt": b"a\0b"}, "is a binary file"),
        ({"a.jsonl": b'{"text": "x"}\n{"text"'}, "a.jsonl:2: is not JSON"),
        ({"a.jsonl": b'{"txt": "x"}\n'}, "did you mean txt"),
        ({"a.jsonl": b'{"text": "x"}\n'}, "no document is held out at a share of 0.05: raise --heldout"),
        ({"a.parquet": b"nothing"}, "is not a readable parquet file"),
    ],
)
def test_sources_that_cannot_be_used(tmp_path, files, words):
    (tmp_path / "s").mkdir()
    for name, content in files.items():
        (tmp_path / "s" / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        prepare_tokens(str(tmp_path / "s"), tmp_path / "p")
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_stream_is_no_source(tmp_path):
    with pytest.raises(DataError, match="download its parquet files and name their folder"):
        prepare_tokens("hf:some/name", tmp_path / "p")


def test_out_must_be_ours(source, made, tmp_path):
    with pytest.raises(ConfigError, match="is not an empty folder"):
        prepare_tokens(str(source), source)
    with pytest.raises(ConfigError, match="holds other tokens"):
        prepare_tokens(str(source / "long.txt"), made.folder)
    before = hashes(made.folder)
    prepare_tokens(str(source), made.folder, part_bytes=PART)  # finished: nothing is done
    assert hashes(made.folder) == before


@pytest.mark.parametrize("n", [1, 2, 3, 17, 64, 65, 1000])
def test_a_permutation_meets_each_number_once(n):
    made = [Permutation(n, 1, e) for e in range(40)]
    for p in made:
        assert sorted(p[i] for i in range(n)) == list(range(n))
    if n >= 17:
        assert len({tuple(p[i] for i in range(n)) for p in made}) == 40
        assert [Permutation(n, 2, 0)[i] for i in range(n)] != [made[0][i] for i in range(n)]


def test_a_permutation_is_even_and_takes_no_memory():
    """Where the first of 16 lands, over many epochs; and one of a trillion."""
    counts = np.bincount([Permutation(16, 0, e)[0] for e in range(3200)], minlength=16)
    assert ((counts - 200) ** 2 / 200).sum() < 38  # chi square of 15 degrees of freedom, one in a thousand
    big = Permutation(10**12, 0, 0)
    values = [big[i] for i in range(2000)]
    assert len(set(values)) == 2000 and abs(np.mean(values) / 10**12 - 0.5) < 0.03
    steps = np.diff(values)
    assert len(set(steps)) == 1999
    with pytest.raises(IndexError):
        big[10**12]
