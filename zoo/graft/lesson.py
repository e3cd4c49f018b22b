"""Text on which a grafted model is taught, and judged before and after."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

from torch import Tensor

from zoo.errors import DataError
from zoo.sections import HUB, STDLIB, DataSection
from zoo.train.evaluate import score
from zoo.train.folder import tokenizer_of
from zoo.train.loader import HeldoutRows, batch
from zoo.train.mixture import MixedRows
from zoo.train.texts import open_sources
from zoo.train.tokenizer import ByteTokenizer, Tokenizer

HELDOUT_BYTES = 65536  # on which it is judged


class Lesson:
    """Rows of `seq_len` tokens by a tokenizer, in batches of `size`. Each of `sources` may be what `data.source` is;
    rows come from all of them in equal parts."""

    def __init__(self, tokenizer: Tokenizer, *sources: str, seq_len: int, size: int):
        for source in sources:
            if source.startswith(HUB):
                raise DataError(f"{source}: held-out text of a streamed data set is not drawn here; give files")
        if len(sources) > 1:
            section = DataSection(mix=tuple({"source": source} for source in sources))
        else:
            section = DataSection(source=sources[0] if sources else STDLIB)
        self.texts: list[Any] = [found.text for found in open_sources(section, tokenizer)]
        self.seq_len, self.size = seq_len, size

    def batches(self, seed: int = 0) -> Iterator[Tensor]:
        """Tokens [size, seq_len] of the train documents, without end."""
        rows = [text.rows(self.seq_len, seed, False) for text in self.texts]
        mixed = MixedRows(rows, [1.0] * len(rows), seed)
        for number in count():
            yield batch(mixed, number * self.size, self.size).inputs

    def heldout_loss(self, model: Any, limit: int = HELDOUT_BYTES) -> float:
        """Nats a token of about `limit` bytes of the held-out documents of every source; their mean."""
        heldout = [HeldoutRows(text.heldout(limit).stream, self.seq_len) for text in self.texts]
        return sum(score(model, rows, len(rows), self.size)["loss"] for rows in heldout) / len(heldout)


def tokenizer_beside(folder: Path, vocab_size: int, name: str = "") -> Tokenizer:
    """The tokenizer of a saved model, a run or a folder of the Hub; bytes where none is there. DataError, which calls
    it by `name`, where the model does not know all of its tokens."""
    own = any((folder / file).is_file() for file in ("config.yaml", "tokenizer.json"))
    tokenizer = tokenizer_of(folder) if own else ByteTokenizer()
    if tokenizer.vocab_size > vocab_size:
        which = "bytes" if isinstance(tokenizer, ByteTokenizer) else "its tokenizer"
        raise DataError(
            f"{name or folder}: the model knows {vocab_size} tokens; text as {which} needs {tokenizer.vocab_size}"
        )
    return tokenizer
