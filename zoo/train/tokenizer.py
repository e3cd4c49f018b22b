"""Text to token ids and back: bytes, or any `tokenizers` JSON file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from zoo.errors import DataError

BYTES = "bytes"
# names under which tokenizers know the end of a document, most usual first
_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<|im_end|>", "[SEP]")


class Tokenizer(Protocol):
    """`end` separates documents: it stands before each one and after the last. `sha256` tells tokenizers apart."""

    vocab_size: int
    end: int
    sha256: str

    def encode(self, documents: Sequence[bytes]) -> list[np.ndarray]: ...
    def decode(self, ids: Iterable[int]) -> str: ...


class ByteTokenizer:
    """A byte is its own id; 256 is the end of a document."""

    vocab_size = 257
    end = 256
    sha256 = hashlib.sha256(b"bytes, 256 ends a document").hexdigest()

    def encode(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        """Ids of each document, uint16."""
        return [np.frombuffer(d, np.uint8).astype(np.uint16) for d in documents]

    def decode(self, ids: Iterable[int]) -> str:
        """Text; what is no UTF-8 shows as the replacement character."""
        return bytes(i for i in ids if 0 <= i < 256).decode("utf-8", "replace")


class FileTokenizer:
    """A tokenizer from a `tokenizers` JSON file. The end of a document is its own end token, or a new id."""

    def __init__(self, path: Path):
        from tokenizers import Tokenizer as Model

        try:
            text = path.read_text(encoding="utf-8")
            self.model = Model.from_str(text)
        except OSError as error:
            raise DataError(f"tokenizer {path}: cannot be read: {error.strerror or error}") from None
        except Exception as error:  # the library raises bare Exception for what is no tokenizer
            raise DataError(f"tokenizer {path}: is not a `tokenizers` JSON file: {error}") from None
        self.path = path
        self.sha256 = hashlib.sha256(text.encode()).hexdigest()
        known = self.model.get_vocab(with_added_tokens=True)
        size = max(known.values(), default=-1) + 1
        self.end = next((known[name] for name in _ENDS if name in known), size)
        self.vocab_size = max(size, self.end + 1)

    def encode(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        """Ids of each document, uint32."""
        texts = [d.decode("utf-8", "replace") for d in documents]
        encoded = self.model.encode_batch_fast(texts, add_special_tokens=False)
        return [np.asarray(e.ids, np.uint32) for e in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        """Text without special tokens."""
        return self.model.decode([i for i in ids if i < self.vocab_size and i != self.end])


def load_tokenizer(name: str) -> Tokenizer:
    """`bytes`, or the path of a `tokenizers` JSON file."""
    return ByteTokenizer() if name == BYTES else FileTokenizer(Path(name).expanduser())
