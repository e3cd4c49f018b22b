"""Documents to train on, from files of this machine, split into train and held-out by whole documents."""

from __future__ import annotations

import hashlib
import json
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from zoo.errors import DataError, did_you_mean
from zoo.sections import STDLIB, SYNTHETIC, DataSection
from zoo.train.tokenizer import Tokenizer

PARQUET, JSON_LINES = ".parquet", (".jsonl", ".ndjson")
# tests come with some Pythons and not with others; `encodings` and `pydoc_data` are generated tables
_NOT_STDLIB = {
    "site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings", "pydoc_data",
}  # fmt: skip


class Document(NamedTuple):
    """Text as bytes. The name is unique in its corpus and decides the split."""

    name: str
    text: bytes


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order that depends on their names only."""

    train: tuple[Document, ...]
    heldout: tuple[Document, ...]
    skipped: tuple[str, ...] = field(default=())  # files of a folder that hold no text

    def summary(self) -> dict[str, int | str]:
        """Sizes, and a hash over everything that is trained or tested on."""
        digest = hashlib.sha256()
        for split in (self.train, self.heldout):
            for name, text in split:
                digest.update(f"{len(name)} {name} {len(text)} ".encode())
                digest.update(text)
        return {
            "train_documents": len(self.train),
            "train_bytes": sum(len(d.text) for d in self.train),
            "heldout_documents": len(self.heldout),
            "heldout_bytes": sum(len(d.text) for d in self.heldout),
            "skipped_files": len(self.skipped),
            "sha256": digest.hexdigest(),
        }


def read_corpus(data: DataSection) -> Corpus:
    """Read `data.source`. DataError says which file cannot be used, and why."""
    skipped: list[str] = []
    documents = [d for d in _read(data, skipped) if d.text]
    if not documents:
        binary = f" ({len(skipped)} files that are no text were left out)" if skipped else ""
        raise DataError(f"{data.source}: there is no text in it{binary}")
    train, heldout = _split(documents, data.heldout)
    return Corpus(tuple(train), tuple(heldout), tuple(skipped))


def source_files(source: str) -> list[tuple[str, Path]]:
    """Names and paths of the files of `data.source`, in the order of the names. Binary files may be among them."""
    if source == STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        files = [f for f in sorted(root.rglob("*.py")) if not _NOT_STDLIB & set(f.relative_to(root).parts)]
        if not files:
            raise DataError(f"this Python has no library sources in {root}; set data.source to a text file or folder")
        return [(f.relative_to(root).as_posix(), f) for f in files]
    path = Path(source).expanduser()
    if path.is_dir():
        named = [(f.relative_to(path), f) for f in sorted(path.rglob("*")) if f.is_file()]
        return [(name.as_posix(), f) for name, f in named if not any(part.startswith(".") for part in name.parts)]
    if not path.exists():
        raise DataError(f"{path}: no such file or folder{did_you_mean(source, (STDLIB, *SYNTHETIC))}")
    return [(path.name, path)]


def _read(data: DataSection, skipped: list[str]) -> Iterator[Document]:
    files = source_files(data.source)
    for name, file in files:
        try:
            yield from _documents(file, name, data.text_key)
        except _NoText:
            if files == [(name, Path(data.source).expanduser())]:
                raise
            skipped.append(name)


class _NoText(DataError):
    pass


def _documents(file: Path, name: str, key: str) -> Iterator[Document]:
    if file.suffix == PARQUET:
        for number, text in enumerate(parquet_texts(file, key), 1):
            if text is not None:
                yield Document(f"{name}:{number}", text)
        return
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror or error}") from None
    if b"\0" in raw:
        raise _NoText(f"{file}: is a binary file, not text")
    if file.suffix in JSON_LINES:
        yield from _json_lines(file, name, key, raw)
    else:
        yield Document(name, raw)


def _json_lines(file: Path, name: str, key: str, raw: bytes) -> Iterator[Document]:
    for number, line in enumerate(raw.split(b"\n"), 1):
        if line.strip():
            yield Document(f"{name}:{number}", text_of_line(line, key, lambda number=number: f"{file}:{number}"))


def text_of_line(line: bytes, key: str, where: Callable[[], str]) -> bytes:
    """The text of a JSONL record; `where` names the line in what goes wrong."""
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where()}: is not JSON: {error}") from None
    text = record.get(key) if isinstance(record, dict) else None
    if not isinstance(text, str):
        keys = list(record) if isinstance(record, dict) else []
        what = f"no text under {key!r}{did_you_mean(key, keys)}" if keys else "is not a JSON object with fields"
        raise DataError(f"{where()}: {what} (data.text_key names the field)")
    return text.encode("utf-8", "replace")


def parquet_texts(file: Path, key: str, groups: Sequence[int] | None = None) -> Iterator[bytes | None]:
    """The text of each row of a parquet file, or of some of its row groups; None where a row holds none."""
    with _parquet_file(file, key) as table:
        for batch in table.iter_batches(batch_size=1024, row_groups=groups, columns=[key]):
            for text in batch.column(0).to_pylist():
                if not isinstance(text, (str, bytes, type(None))):
                    raise DataError(f"{file}: column {key!r} holds {type(text).__name__}, not text")
                yield text.encode() if isinstance(text, str) else text


def parquet_groups(file: Path, key: str) -> list[int]:
    """About how many bytes of text each row group of a parquet file holds."""
    with _parquet_file(file, key) as table:
        groups = [table.metadata.row_group(i) for i in range(table.num_row_groups)]
        columns = [[g.column(i) for i in range(g.num_columns)] for g in groups]
        return [sum(c.total_uncompressed_size for c in cs if c.path_in_schema == key) for cs in columns]


@contextmanager
def _parquet_file(file: Path, key: str) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            columns = table.schema_arrow.names
            if key not in columns:
                raise DataError(f"{file}: no column {key!r}; columns: {', '.join(columns)} (data.text_key names it)")
            yield table
    except pyarrow.ArrowException as error:
        raise DataError(f"{file}: is not a readable parquet file: {str(error).splitlines()[0]}") from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror or error}") from None


def _split(documents: Sequence[Document], share: float) -> tuple[list[Document], list[Document]]:
    """Held-out documents are drawn by the hash of their names, so that a split survives other files coming and
    going. Where no document is small enough, the tail of the longest one is held out."""
    order = sorted(documents, key=lambda d: (name_hash(d.name), d.name))
    drawn = draw_heldout([(d.name, len(d.text)) for d in order], share)
    train = [d for d in order if d.name not in drawn]
    heldout = [d for d in order if d.name in drawn]
    if not heldout:
        wanted = share * sum(len(d.text) for d in documents)
        at = max(range(len(train)), key=lambda i: len(train[i].text))
        name, text = train[at]
        cut = len(text) - max(1, min(round(wanted), len(text) - 1))
        cut = text.rfind(b"\n", cut // 2, cut) + 1 or cut
        if cut < 1:
            raise DataError(f"{name}: one byte is too little to train on")
        train[at] = Document(name, text[:cut])
        heldout = [Document(f"{name} from byte {cut}", text[cut:])]
    return train, heldout


def name_hash(name: str) -> bytes:
    """Where a document stands in the order in which documents are held out."""
    return hashlib.sha256(name.encode()).digest()


def draw_heldout(sizes: Sequence[tuple[str, int]], share: float) -> set[str]:
    """Names of the documents that are held out, of (name, size) in the order of the hashes of the names."""
    wanted, size, drawn = share * sum(n for _, n in sizes), 0, set()
    for name, n in sizes:
        if size < wanted and size + n <= 1.2 * wanted:
            drawn.add(name)
            size += n
    return drawn


def some_documents(documents: Sequence[Document], limit: int) -> list[Document]:
    """The first `limit` bytes of documents, the last one cut where a character begins."""
    chosen, room = [], limit
    for name, text in documents:
        if room <= 0:
            break
        while len(text) > room and room > 0 and text[room] & 0xC0 == 0x80:
            room -= 1
        chosen.append(Document(name, text[:room]))
        room -= len(text)
    return [d for d in chosen if d.text]


class Tokens(Protocol):
    """Documents as one line of ids, in memory (`Stream`) or on disk (`zoo.train.tokens.MappedStream`)."""

    def __len__(self) -> int: ...
    def window(self, start: int, stop: int) -> np.ndarray: ...
    def documents(self, start: int, stop: int) -> np.ndarray: ...


@dataclass(frozen=True)
class Stream:
    """Documents as one line of ids, `end` before each and after the last; `starts` are those of the documents."""

    ids: np.ndarray
    starts: np.ndarray

    @classmethod
    def of(cls, documents: Sequence[Document], tokenizer: Tokenizer) -> Stream:
        """Tokenize and join."""
        parts, starts, at = [], [], 0
        for ids in tokenizer.encode([d.text for d in documents]):
            starts.append(at)
            parts += [np.array([tokenizer.end], ids.dtype), ids]
            at += 1 + len(ids)
        parts.append(np.array([tokenizer.end], parts[0].dtype))
        return cls(np.concatenate(parts), np.asarray(starts, np.int64))

    def __len__(self) -> int:
        return len(self.ids)

    def window(self, start: int, stop: int) -> np.ndarray:
        """Tokens start .. stop - 1."""
        return self.ids[start:stop]

    def documents(self, start: int, stop: int) -> np.ndarray:
        """Number of the document of each of these tokens, counted from 1."""
        return np.searchsorted(self.starts, np.arange(start, stop), side="right")


@dataclass(frozen=True)
class Heldout:
    """Held-out text: its tokens, how many bytes they stand for, and its documents."""

    stream: Tokens
    size: int
    documents: Sequence[Document]

    @classmethod
    def of(cls, documents: Sequence[Document], tokenizer: Tokenizer) -> Heldout:
        """Documents, tokenized."""
        return cls(Stream.of(documents, tokenizer), sum(len(d.text) for d in documents), documents)
