"""Datasets of Hugging Face, streamed: `data.source: hf:NAME`, `hf:NAME:CONFIG`, or a local folder as `hf:PATH`.

The split `train` is read, in its own order. A text is held out where its sha256 lies in the first `data.heldout` of
all: so the same texts are held out whichever process reads them, and twins are not parted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from zoo.errors import DataError, did_you_mean
from zoo.sections import HUB, DataSection
from zoo.train.corpus import Document, Heldout, some_documents
from zoo.train.tokenizer import Tokenizer

_COUNTED_BYTES = 1 << 22  # of the texts that are trained on so much is read for the n-grams


@dataclass(frozen=True)
class HubRows:
    """Rows that torchtitan's loader makes of a streamed dataset; they come in order, and none has a number."""

    source: str
    text_key: str
    heldout: float
    tokenizer: Tokenizer
    doc_ids: bool

    def open(self) -> Any:
        """The iterable dataset, held-out texts and all."""
        return _open(self.source, self.text_key)

    def trains_on(self, record: dict[str, Any]) -> bool:
        """Whether a record has a text, and that is not held out."""
        text = _text(record, self.text_key)
        return bool(text) and not _is_heldout(text, self.heldout)


class HubText:
    """A streamed dataset. What is held out is read once, at the beginning, up to `data.heldout_bytes`."""

    def __init__(self, data: DataSection, tokenizer: Tokenizer):
        self.data, self.tokenizer = data, tokenizer
        self.documents: list[Document] = []
        self.trained: list[Document] = []
        room, counted = data.heldout_bytes, 0
        with reading(data.source):
            for record in _open(data.source, data.text_key):
                text = _text(record, data.text_key)
                if not text:
                    continue
                if _is_heldout(text, data.heldout):
                    self.documents.append(Document(f"held-out text {len(self.documents)}", text))
                    room -= len(text)
                elif counted < _COUNTED_BYTES:
                    self.trained.append(Document(f"text {len(self.trained)}", text))
                    counted += len(text)
                if room <= 0 and self.trained:
                    break
        if not self.documents or not self.trained:
            what = "held out" if self.trained else "left to train on"
            raise DataError(f"{data.source}: no text of it is {what} at data.heldout {data.heldout}")

    def summary(self) -> dict[str, Any]:
        """What is held out; the rest is not known before it was read."""
        digest = hashlib.sha256(b"".join(hashlib.sha256(d.text).digest() for d in self.documents)).hexdigest()
        size = sum(len(d.text) for d in self.documents)
        return {"heldout_documents": len(self.documents), "heldout_bytes": size, "sha256": digest}

    def rows(self, seq_len: int, seed: int, doc_ids: bool) -> HubRows:
        """The rows of the whole stream, again and again."""
        return HubRows(self.data.source, self.data.text_key, self.data.heldout, self.tokenizer, doc_ids)

    @property
    def bytes_per_token(self) -> float:
        """Of the held-out text."""
        found = self.heldout(self.data.heldout_bytes)
        return found.size / len(found.stream)

    def heldout(self, limit: int) -> Heldout:
        return Heldout.of(some_documents(self.documents, limit), self.tokenizer)

    def train_documents(self) -> Sequence[Document]:
        return self.trained


def _open(source: str, key: str) -> Any:
    """The iterable dataset of a source."""
    name, _, config = source.removeprefix(HUB).partition(":")
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"{source}: needs the package `datasets`: pip install datasets ({error})") from None
    with reading(source):
        found = datasets.load_dataset(name, config or None, split="train", streaming=True)
    columns = found.column_names or [key]
    if key not in columns:
        hint = did_you_mean(key, columns) or f"; columns: {', '.join(columns)}"
        raise DataError(f"{source}: has no column {key!r}{hint} (data.text_key names it)")
    return found


class reading:
    """What goes wrong while a dataset is read becomes one DataError that names it."""

    def __init__(self, source: str):
        self.source = source

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        # a hub raises whatever its transport raises: OSError, ValueError and classes of its own
        if isinstance(error, Exception) and not isinstance(error, DataError):
            first = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise DataError(
                f"{self.source}: cannot be read: {first} (is there a network, and is the name right?)"
            ) from error


def _text(record: dict[str, Any], key: str) -> bytes:
    text = record.get(key)
    return text.encode("utf-8", "replace") if isinstance(text, str) else b""


def _is_heldout(text: bytes, share: float) -> bool:
    return int.from_bytes(hashlib.sha256(text).digest()[:8]) < share * 2**64
