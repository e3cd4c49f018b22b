"""Prepared tokens: a folder that `zoo data prepare` wrote, read by memory map.

index.json            sizes, type of a token, tokenizer, and sha256 of every shard
train-00000.bin       tokens of a part of the source, uint16 or uint32; the shards of a split, joined in order, are
                      what `Stream` holds in memory: the end token before each document and after the last
train-00000.docs      [documents, 2] int64: the token at which a document begins, counted in the shard, and its bytes
heldout-...           the same for the held-out documents
tokenizer.json        the tokenizer, where it came from a file
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from zoo.errors import DataError
from zoo.train.tokenizer import Tokenizer

INDEX = "index.json"
FORMAT = 1
_OPEN_SHARDS = 64  # a map holds a file descriptor


@dataclass(frozen=True)
class Shard:
    """One file of tokens, `name`.bin, and its documents, `name`.docs."""

    name: str
    tokens: int
    documents: int
    bytes: int  # of text
    sha256: str
    docs_sha256: str

    def files(self, item: int) -> list[tuple[str, int, str]]:
        """(file, size, sha256), for tokens of `item` bytes."""
        return [
            (f"{self.name}.bin", self.tokens * item, self.sha256),
            (f"{self.name}.docs", self.documents * 16, self.docs_sha256),
        ]


def is_prepared(source: str) -> bool:
    """Whether `data.source` is a folder of prepared tokens, finished or begun."""
    folder = Path(source).expanduser()
    return (folder / INDEX).is_file() or (folder / "plan.json").is_file()


class Prepared:
    """A folder of prepared tokens. DataError where it is not whole."""

    def __init__(self, folder: Path):
        self.folder = folder
        path = folder / INDEX
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
            if index["format"] != FORMAT:
                raise DataError(f"{path}: is of format {index['format']}, this version reads {FORMAT}")
            self.index: dict[str, Any] = index
            self.dtype = np.dtype(index["dtype"])
            self.shards = {split: [Shard(**s) for s in found] for split, found in index["splits"].items()}
        except FileNotFoundError:
            raise DataError(f"{folder}: is not finished; run the same `zoo data prepare` again to go on") from None
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{path}: is not an index of prepared tokens ({error}); prepare them again") from None

    def split(self, name: str) -> MappedStream:
        """The tokens of `train` or `heldout`. The sizes of all files are checked."""
        for file, size, _ in self.files(name):
            check_size(self.folder / file, size)
        return MappedStream(self.folder, self.shards[name], self.dtype)

    def files(self, *splits: str) -> list[tuple[str, int, str]]:
        """(file, size, sha256) of all shards, or of those of some splits."""
        chosen = [s for name in splits or self.shards for s in self.shards[name]]
        return [file for shard in chosen for file in shard.files(self.dtype.itemsize)]

    def check(self, advance: Callable[[int], None] = lambda done: None) -> None:
        """Read every shard and compare its sha256; `advance` is told the bytes read so far."""
        before = 0
        for file, size, wanted in self.files():
            check_size(self.folder / file, size)
            found = sha256_of(self.folder / file, lambda done, before=before: advance(before + done))
            if found != wanted:
                again = f"remove {self.folder} and prepare it again"
                raise DataError(f"{self.folder / file}: is not what was written (sha256 {found}); {again}")
            before += size

    def check_tokenizer(self, tokenizer: Tokenizer, name: str) -> None:
        """DataError where the tokens were made by another tokenizer."""
        made = self.index["tokenizer"]
        if tokenizer.sha256 != made["sha256"]:
            kept = self.folder / "tokenizer.json"
            remedy = f"set data.tokenizer: {kept if kept.is_file() else made['name']}"
            raise DataError(f"{self.folder}: was made by the tokenizer {made['name']}, not by {name}; {remedy}")

    def summary(self) -> dict[str, int | str]:
        """Sizes, and a hash over everything that is trained or tested on."""
        total: dict[str, int | str] = {}
        for split, shards in self.shards.items():
            for what in ("documents", "bytes", "tokens"):
                total[f"{split}_{what}"] = sum(getattr(s, what) for s in shards)
        total["skipped_files"] = self.index["skipped_files"]
        hashes = "".join(f"{file} {sha}\n" for file, _, sha in self.files())
        return total | {"sha256": hashlib.sha256(hashes.encode()).hexdigest()}


class MappedStream:
    """The tokens of a split, read where they lie."""

    def __init__(self, folder: Path, shards: Sequence[Shard], dtype: np.dtype):
        self.folder, self.shards, self.dtype = folder, shards, dtype
        self.first = [0, *accumulate(s.tokens for s in shards)]  # token at which each shard begins
        self.before = [0, *accumulate(s.documents for s in shards)]  # documents that begin before it
        self._map = lru_cache(maxsize=2 * _OPEN_SHARDS)(self._map_file)

    def __len__(self) -> int:
        return self.first[-1]

    def _map_file(self, file: str, size: int) -> np.ndarray:
        path = self.folder / file
        check_size(path, size)
        if not size:
            return np.empty(0, np.uint8)
        try:
            return np.memmap(path, np.uint8, "r")
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None

    def tokens(self, shard: int) -> np.ndarray:
        """The tokens of one shard."""
        file, size, _ = self.shards[shard].files(self.dtype.itemsize)[0]
        return self._map(file, size).view(self.dtype)

    def docs(self, shard: int) -> np.ndarray:
        """[documents, 2]: first token and bytes of the documents that begin in a shard."""
        file, size, _ = self.shards[shard].files(self.dtype.itemsize)[1]
        return self._map(file, size).view(np.int64).reshape(-1, 2)

    def _pieces(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """(shard, start, stop) of each shard that has tokens of a window, counted in the shard."""
        pieces, shard = [], bisect_right(self.first, start) - 1
        while start < min(stop, len(self)):
            end = min(stop, self.first[shard + 1])
            if end > start:
                pieces.append((shard, start - self.first[shard], end - self.first[shard]))
            start, shard = max(start, end), shard + 1
        return pieces

    def window(self, start: int, stop: int) -> np.ndarray:
        """Tokens start .. stop - 1."""
        return np.concatenate([self.tokens(s)[a:b] for s, a, b in self._pieces(start, stop)])

    def documents(self, start: int, stop: int) -> np.ndarray:
        """Number of the document of each of these tokens, counted from 1; behind the end that of the last."""
        numbers = [
            self.before[s] + np.searchsorted(self.docs(s)[:, 0], np.arange(a, b), side="right")
            for s, a, b in self._pieces(start, stop)
        ]
        missing = stop - max(start, min(stop, len(self)))
        return np.concatenate([*numbers, np.full(missing, self.before[-1])]).astype(np.int64)

    def prefix(self, limit: int) -> tuple[list[int], list[int], int]:
        """The documents with which the first `limit` bytes of text end: where they begin, the bytes of each, and the
        token behind the last of them (its end token not counted)."""
        starts: list[int] = []
        sizes: list[int] = []
        room = limit
        for shard in range(len(self.shards)):
            for start, size in self.docs(shard).tolist():
                if room <= 0:
                    return starts, sizes, self.first[shard] + start
                starts.append(self.first[shard] + start)
                sizes.append(size)
                room -= size
        return starts, sizes, len(self) - 1


def index_text(index: dict[str, Any], splits: dict[str, list[Shard]]) -> str:
    """The text of index.json."""
    return json.dumps(index | {"splits": {k: [asdict(s) for s in v] for k, v in splits.items()}}, indent=1) + "\n"


def check_size(path: Path, size: int) -> None:
    """DataError where a file is missing or has another size."""
    try:
        have = path.stat().st_size
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}; prepare {path.parent} again") from None
    if have != size:
        raise DataError(f"{path}: has {have} bytes, not {size}; remove {path.parent} and prepare it again")


def sha256_of(path: Path, advance: Callable[[int], None] = lambda done: None) -> str:
    """sha256 of a file, read in pieces."""
    digest, done = hashlib.sha256(), 0
    try:
        with path.open("rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
                done += len(piece)
                advance(done)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    return digest.hexdigest()
