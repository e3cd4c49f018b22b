"""Bytes of the sources of this machine's Python, for the claims that train a language model."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from zoo.sections import DataSection
from zoo.train.corpus import Heldout, Stream, read_corpus, some_documents
from zoo.train.evaluate import bits_per_byte, score
from zoo.train.loader import HeldoutRows, Loader, TrainRows
from zoo.train.tokenizer import ByteTokenizer

VOCAB = ByteTokenizer().vocab_size


class Text:
    """Text to train on, and the first `heldout` bytes of the documents kept from it. tiny: one package of it only."""

    def __init__(self, seq_len: int, heldout: int, *, tiny: bool = False):
        source = {"source": str(Path(sysconfig.get_path("stdlib")) / "json")} if tiny else {}
        corpus, tokenizer = read_corpus(DataSection(**source)), ByteTokenizer()
        text = Heldout.of(some_documents(corpus.heldout, heldout), tokenizer)
        self.seq_len = seq_len
        self.stream = Stream.of(corpus.train, tokenizer)
        self.heldout, self.heldout_bytes = text.stream, text.size
        self.text, self.rows = text, HeldoutRows(text.stream, seq_len)

    def batches(self, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless batches (inputs, labels) [size, T]; batch n is the same in every run of a seed."""
        for part in Loader(TrainRows(self.stream, self.seq_len, seed), size):
            yield part.inputs, part.labels

    def bits(self, model: Any) -> float:
        """Held-out bits per byte; every row starts without context."""
        return bits_per_byte(score(model, self.rows, len(self.rows), 32)["loss"], self.text)
