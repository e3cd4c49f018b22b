import json
import os

import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from zoo.errors import DataError
from zoo.sections import DataSection
from zoo.train.corpus import Document, Stream, read_corpus, some_documents
from zoo.train.tokenizer import ByteTokenizer, load_tokenizer


def write(path, files):
    for name, text in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(text if isinstance(text, bytes) else text.encode())


def texts(corpus):
    return {d.text for d in (*corpus.train, *corpus.heldout)}


def test_folder_is_split_by_file_and_the_same_each_time(tmp_path):
    write(tmp_path, {f"{i // 10}/{i}.txt": f"file {i}\n" * 20 for i in range(60)})
    a, b = (read_corpus(DataSection(source=str(tmp_path), heldout=0.1)) for _ in range(2))
    assert a == b
    assert len(a.train) + len(a.heldout) == 60 and len(texts(a)) == 60
    share = a.summary()["heldout_bytes"] / (a.summary()["heldout_bytes"] + a.summary()["train_bytes"])
    assert 0.1 <= share <= 0.13
    (tmp_path / "0" / "3.txt").write_text("changed")
    assert read_corpus(DataSection(source=str(tmp_path))).summary()["sha256"] != a.summary()["sha256"]


def test_binary_and_hidden_files_of_a_folder_are_left_out(tmp_path):
    write(tmp_path, {"a.txt": "some text " * 9, "b.png": b"\x89PNG\0\0", ".git/c": "hidden", "d.txt": ""})
    corpus = read_corpus(DataSection(source=str(tmp_path)))
    assert corpus.skipped == ("b.png",)
    assert b"".join(d.text for d in (*corpus.train, *corpus.heldout)) == b"some text " * 9


def test_one_file_holds_out_its_tail_at_a_line(tmp_path):
    lines = "".join(f"line {i}\n" for i in range(200)).encode()
    (tmp_path / "a.txt").write_bytes(lines)
    corpus = read_corpus(DataSection(source=str(tmp_path / "a.txt"), heldout=0.25))
    assert corpus.train[0].text + corpus.heldout[0].text == lines
    assert corpus.train[0].text.endswith(b"\n")
    assert 0.2 < len(corpus.heldout[0].text) / len(lines) < 0.3


def test_jsonl_and_parquet_rows_are_documents(tmp_path):
    rows = [{"body": f"document {i} " * 3} for i in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        corpus = read_corpus(DataSection(source=str(tmp_path / name), text_key="body", heldout=0.2))
        assert texts(corpus) == {r["body"].encode() for r in rows}
        assert len(corpus.heldout) >= 8


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("missing.txt", None, "no such file or folder"),
        ("python-stdlb", None, "did you mean python-stdlib?"),
        ("empty.txt", b"", "there is no text in it"),
        ("binary.txt", b"abc\0def", "is a binary file"),
        ("a.jsonl", b'{"text": "x"}\n{"text"', "a.jsonl:2: is not JSON"),
        ("b.jsonl", b'{"txt": "x"}\n', "b.jsonl:1: no text under 'text'; did you mean txt?"),
        ("c.jsonl", b"[1]\n", "c.jsonl:1: is not a JSON object"),
        ("a.parquet", b"nothing", "is not a readable parquet file"),
        ("x.txt", b"x", "too little to train on"),
    ],
)
def test_data_that_cannot_be_used(tmp_path, monkeypatch, name, content, words):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_corpus(DataSection(source=name))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_parquet_without_the_column(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="no column 'text'; columns: body, n"):
        read_corpus(DataSection(source=str(tmp_path / "a.parquet")))
    with pytest.raises(DataError, match="holds int, not text"):
        read_corpus(DataSection(source=str(tmp_path / "a.parquet"), text_key="n"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file(tmp_path):
    (tmp_path / "a.txt").write_text("secret")
    (tmp_path / "a.txt").chmod(0)
    with pytest.raises(DataError, match="cannot be read: Permission denied"):
        read_corpus(DataSection(source=str(tmp_path / "a.txt")))


def test_default_corpus_is_real_python():
    corpus = read_corpus(DataSection())
    sizes = corpus.summary()
    names = {d.name for d in corpus.train} | {d.name for d in corpus.heldout}
    assert sizes["train_bytes"] > 3_000_000 and sizes["heldout_bytes"] > 100_000
    assert "argparse.py" in names and not any("site-packages" in n or n.startswith("test/") for n in names)
    assert not {d.name for d in corpus.train} & {d.name for d in corpus.heldout}


def test_bytes_round_trip_and_stream_layout():
    t = ByteTokenizer()
    text = "Grüße, 世界\n"
    assert t.decode(t.encode([text.encode()])[0].tolist()) == text
    stream = Stream.of([Document("a", b"ab"), Document("b", b"c")], t)
    assert stream.ids.tolist() == [256, 97, 98, 256, 99, 256]
    assert stream.starts.tolist() == [0, 3]


def test_tokenizer_file(tmp_path):
    words = {"hello": 0, "world": 1, "?": 2}
    model = Tokenizer(models.WordLevel(words, unk_token="?"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    path = tmp_path / "t.json"
    model.save(str(path))
    t = load_tokenizer(str(path))
    assert (t.vocab_size, t.end) == (4, 3)  # no end token of its own: a new id
    assert t.encode([b"hello world hm"])[0].tolist() == [0, 1, 2]
    assert t.decode([0, 1, 3]) == "hello world"
    model.add_special_tokens(["</s>"])
    model.save(str(path))
    t = load_tokenizer(str(path))
    assert (t.vocab_size, t.end) == (4, 3)
    for bad, words in ((tmp_path / "no.json", "cannot be read"), (tmp_path, "cannot be read")):
        with pytest.raises(DataError, match=words):
            load_tokenizer(str(bad))
    path.write_text("{}")
    with pytest.raises(DataError, match="is not a `tokenizers` JSON file"):
        load_tokenizer(str(path))


def test_heldout_bytes_end_at_a_character():
    documents = (Document("a", b"abc"), Document("b", "éé".encode()), Document("c", b"x" * 9))
    assert [d.text for d in some_documents(documents, 6)] == [b"abc", "é".encode()]
    assert sum(len(d.text) for d in some_documents(documents, 10**9)) == 16
    assert [d.text for d in some_documents(documents, 1)] == [b"a"]
