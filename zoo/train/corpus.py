"""Documents to train on, from files of this machine, split into train and held-out by whole documents."""

from __future__ import annotations

import hashlib
import json
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from zoo.errors import DataError, did_you_mean
from zoo.sections import STDLIB, SYNTHETIC, DataSection
from zoo.train.tokenizer import Tokenizer

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


def _read(data: DataSection, skipped: list[str]) -> Iterator[Document]:
    if data.source == STDLIB:
        yield from _stdlib()
        return
    path = Path(data.source).expanduser()
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            name = file.relative_to(path)
            if file.is_file() and not any(part.startswith(".") for part in name.parts):
                try:
                    yield from _documents(file, name.as_posix(), data.text_key)
                except _NoText:
                    skipped.append(name.as_posix())
    else:
        if not path.exists():
            hint = did_you_mean(data.source, (STDLIB, *SYNTHETIC))
            raise DataError(f"{path}: no such file or folder{hint}")
        yield from _documents(path, path.name, data.text_key)


class _NoText(DataError):
    pass


def _documents(file: Path, name: str, key: str) -> Iterator[Document]:
    try:
        if file.suffix == ".parquet":
            yield from _parquet(file, name, key)
            return
        raw = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror or error}") from None
    if b"\0" in raw:
        raise _NoText(f"{file}: is a binary file, not text")
    if file.suffix in (".jsonl", ".ndjson"):
        yield from _json_lines(file, name, key, raw)
    else:
        yield Document(name, raw)


def _json_lines(file: Path, name: str, key: str, raw: bytes) -> Iterator[Document]:
    for number, line in enumerate(raw.splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{file}:{number}: is not JSON: {error}") from None
        text = record.get(key) if isinstance(record, dict) else None
        if not isinstance(text, str):
            keys = list(record) if isinstance(record, dict) else []
            what = f"no text under {key!r}{did_you_mean(key, keys)}" if keys else "is not a JSON object with fields"
            raise DataError(f"{file}:{number}: {what} (data.text_key names the field)")
        yield Document(f"{name}:{number}", text.encode("utf-8", "replace"))


def _parquet(file: Path, name: str, key: str) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
        columns = table.schema_arrow.names
        if key not in columns:
            raise DataError(f"{file}: no column {key!r}; columns: {', '.join(columns)} (data.text_key names it)")
        number = 0
        for batch in table.iter_batches(columns=[key]):
            for text in batch.column(0).to_pylist():
                number += 1
                if isinstance(text, (str, bytes)):
                    yield Document(f"{name}:{number}", text.encode() if isinstance(text, str) else text)
                elif text is not None:
                    raise DataError(f"{file}: column {key!r} holds {type(text).__name__}, not text")
    except pyarrow.ArrowException as error:
        raise DataError(f"{file}: is not a readable parquet file: {str(error).splitlines()[0]}") from None


def _stdlib() -> Iterator[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    files = [f for f in sorted(root.rglob("*.py")) if not _NOT_STDLIB & set(f.relative_to(root).parts)]
    if not files:
        raise DataError(f"this Python has no library sources in {root}; set data.source to a text file or folder")
    for file in files:
        try:
            text = file.read_bytes()
        except OSError as error:
            raise DataError(f"{file}: cannot be read: {error.strerror or error}") from None
        if b"\0" not in text:
            yield Document(file.relative_to(root).as_posix(), text)


def _split(documents: Sequence[Document], share: float) -> tuple[list[Document], list[Document]]:
    """Held-out documents are drawn by the hash of their names, so that a split survives other files coming and
    going. Where no document is small enough, the tail of the longest one is held out."""
    order = sorted(documents, key=lambda d: (hashlib.sha256(d.name.encode()).digest(), d.name))
    wanted = share * sum(len(d.text) for d in documents)
    train, heldout, size = [], [], 0
    for d in order:
        if size < wanted and size + len(d.text) <= 1.2 * wanted:
            heldout.append(d)
            size += len(d.text)
        else:
            train.append(d)
    if not heldout:
        at = max(range(len(train)), key=lambda i: len(train[i].text))
        name, text = train[at]
        cut = len(text) - max(1, min(round(wanted), len(text) - 1))
        cut = text.rfind(b"\n", cut // 2, cut) + 1 or cut
        if cut < 1:
            raise DataError(f"{name}: one byte is too little to train on")
        train[at] = Document(name, text[:cut])
        heldout = [Document(f"{name} from byte {cut}", text[cut:])]
    return train, heldout


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
