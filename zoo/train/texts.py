"""Text to train on and to be judged on: documents in memory, or tokens that were prepared on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from zoo.sections import HUB, DataSection
from zoo.train.corpus import Corpus, Document, Heldout, Stream, read_corpus, some_documents
from zoo.train.hub import HubRows, HubText
from zoo.train.loader import Rows, TrainRows
from zoo.train.tokenizer import ByteTokenizer, Tokenizer
from zoo.train.tokens import MappedStream, Prepared, is_prepared

_COUNTED_BYTES = 1 << 24  # of prepared text about so much is read for the n-grams that a model is compared with


class Text(Protocol):
    """`rows`: what to train on. `heldout(limit)`: about the first `limit` bytes of the held-out documents."""

    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def bytes_per_token(self) -> float: ...
    def rows(self, seq_len: int, seed: int, doc_ids: bool) -> Rows | HubRows: ...
    def summary(self) -> dict[str, Any]: ...
    def heldout(self, limit: int) -> Heldout: ...
    def train_documents(self) -> Sequence[Document]: ...


class _Addressed:
    """Text whose tokens can be read anywhere."""

    train: Stream | MappedStream
    train_bytes: int

    def rows(self, seq_len: int, seed: int, doc_ids: bool) -> Rows:
        """Windows of the train documents."""
        return TrainRows(self.train, seq_len, seed, doc_ids)

    @property
    def bytes_per_token(self) -> float:
        """Of the train documents."""
        return self.train_bytes / len(self.train)


class MemoryText(_Addressed):
    """Documents that were read into memory."""

    train: Stream

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer):
        self.corpus, self.tokenizer = corpus, tokenizer
        self.train = Stream.of(corpus.train, tokenizer)
        self.train_bytes = sum(len(d.text) for d in corpus.train)

    def summary(self) -> dict[str, Any]:
        return self.corpus.summary()

    def heldout(self, limit: int) -> Heldout:
        """Cut where a character begins."""
        return Heldout.of(some_documents(self.corpus.heldout, limit), self.tokenizer)

    def train_documents(self) -> Sequence[Document]:
        return self.corpus.train


class PreparedText(_Addressed):
    """Prepared tokens. Text is what the tokens decode to; the bytes of whole documents are those of their sources."""

    train: MappedStream

    def __init__(self, prepared: Prepared, tokenizer: Tokenizer, name: str):
        prepared.check_tokenizer(tokenizer, name)
        self.prepared, self.tokenizer = prepared, tokenizer
        self.train, self.rest = prepared.split("train"), prepared.split("heldout")
        self.train_bytes = sum(s.bytes for s in self.train.shards)

    def summary(self) -> dict[str, Any]:
        return self.prepared.summary()

    def heldout(self, limit: int) -> Heldout:
        """Whole documents up to the one that passes the limit, which is cut to as many tokens as its share of bytes;
        what was cut is counted as what it decodes to."""
        starts, sizes, stop = self.rest.prefix(limit)
        over = sum(sizes) - limit
        if over > 0:
            share = (sizes[-1] - over) / sizes[-1]
            stop = starts[-1] + 1 + max(1, round(share * (stop - starts[-1] - 1)))
        documents = self._documents(self.rest, starts, stop)
        if over > 0:
            sizes[-1] = len(documents[-1].text)
        ids = np.append(self.rest.window(0, stop), np.array([self.tokenizer.end], self.rest.dtype))
        return Heldout(Stream(ids, np.asarray(starts, np.int64)), sum(sizes), documents)

    def train_documents(self) -> Sequence[Document]:
        """The first of them only."""
        starts, _, stop = self.train.prefix(_COUNTED_BYTES)
        return self._documents(self.train, starts, min(stop, starts[-1] + _COUNTED_BYTES))

    def _documents(self, stream: MappedStream, starts: Sequence[int], stop: int) -> list[Document]:
        ends = [*starts[1:], stop]
        return [Document(f"token {a}", self._text(stream.window(a, b))) for a, b in zip(starts, ends, strict=True)]

    def _text(self, ids: np.ndarray) -> bytes:
        ids = ids[ids != self.tokenizer.end]
        if isinstance(self.tokenizer, ByteTokenizer):
            return ids.astype(np.uint8).tobytes()
        return self.tokenizer.decode(ids.tolist()).encode("utf-8", "replace")


def open_text(data: DataSection, tokenizer: Tokenizer) -> Text:
    """What `data.source` names. DataError says what cannot be used."""
    if data.source.startswith(HUB):
        return HubText(data, tokenizer)
    if is_prepared(data.source):
        return PreparedText(Prepared(Path(data.source).expanduser()), tokenizer, data.tokenizer)
    return MemoryText(read_corpus(data), tokenizer)


@dataclass(frozen=True)
class Source:
    """One of the texts of a run; `share` is its part of the rows."""

    name: str
    share: float
    text: Text


def open_sources(data: DataSection, tokenizer: Tokenizer) -> list[Source]:
    """The text of `data.source`, or the texts of `data.mix`, named after their files."""
    if not data.mix:
        return [Source(Path(data.source).stem, 1.0, open_text(data, tokenizer))]
    found: dict[str, Source] = {}
    total = sum(weight for weight, _ in data.sources())
    for weight, section in data.sources():
        stem = name = Path(section.source).stem
        while name in found:
            name = f"{stem}-{len(found) + 1}"
        found[name] = Source(name, weight / total, open_text(section, tokenizer))
    return list(found.values())


def over_sources(sources: Sequence[Source], figures: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    """Figures of each source and of the mixture, which has the mean in proportion to the shares, and sums of counts.
    `name`: how the figure of a source is named, of {source} and {figure}."""
    if len(sources) == 1:
        return figures[0]
    whole: dict[str, Any] = {}
    for key, value in figures[0].items():
        if isinstance(value, int):
            whole[key] = sum(f[key] for f in figures)
        else:
            whole[key] = sum(s.share * f[key] for s, f in zip(sources, figures, strict=True))
    for source, found in zip(sources, figures, strict=True):
        whole |= {name.format(source=source.name, figure=key): value for key, value in found.items()}
    return whole
