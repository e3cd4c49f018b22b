"""Rows addressed by a global index. Row i is a pure function of (data, seed, i); so a loader's whole state is
one integer, a run resumes exactly, and n processes see together what one process sees."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from zoo.errors import DataError
from zoo.train.corpus import Tokens
from zoo.train.permute import Permutation
from zoo.train.synthetic import IGNORE, Sample


class Row(NamedTuple):
    """inputs, labels: [T]; labels are IGNORE where nothing is scored. doc_ids: [T], or None. noise, block: see
    `NoisyRows`. Of an image: inputs [C, H, W] float32, labels [1]."""

    inputs: np.ndarray
    labels: np.ndarray
    doc_ids: np.ndarray | None = None
    noise: np.ndarray | None = None
    block: int | None = None


class Rows(Protocol):
    """An endless (`TrainRows`, `TaskRows`) or finite (`HeldoutRows`) supply of rows."""

    def row(self, index: int) -> Row: ...


class Batch(NamedTuple):
    """Rows stacked: int64 [B, T] each, the noise float32; images are float32 [B, C, H, W]."""

    inputs: Tensor
    labels: Tensor
    doc_ids: Tensor | None
    noise: Tensor | None
    block: int | None

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        return Batch(*(t.to(device) if isinstance(t, Tensor) else t for t in self))  # type: ignore[arg-type]


def batch(rows: Rows, first: int, count: int) -> Batch:
    """Rows first .. first + count - 1."""
    parts = [rows.row(i) for i in range(first, first + count)]

    def stack(arrays: list[np.ndarray]) -> Tensor:
        stacked = np.stack(arrays)
        return torch.from_numpy(stacked if stacked.dtype == np.float32 else stacked.astype(np.int64))

    ids = None if parts[0].doc_ids is None else stack([p.doc_ids for p in parts if p.doc_ids is not None])
    noise = None
    if parts[0].noise is not None:
        noise = torch.from_numpy(np.stack([p.noise for p in parts if p.noise is not None]).astype(np.float32))
    return Batch(stack([p.inputs for p in parts]), stack([p.labels for p in parts]), ids, noise, parts[0].block)


class TrainRows:
    """Windows of a stream. Each epoch cuts the stream at another offset and visits the windows in another order."""

    def __init__(self, stream: Tokens, seq_len: int, seed: int, doc_ids: bool = False):
        have = len(stream)
        if have < seq_len + 1:
            raise DataError(f"the training text has {have} tokens; one row needs train.seq_len + 1 = {seq_len + 1}")
        self.stream, self.seq_len, self.seed, self.doc_ids = stream, seq_len, seed, doc_ids
        self.per_epoch = max(1, (have - 1) // seq_len - 1)
        self._order = lru_cache(maxsize=2)(self._order_of)

    def _order_of(self, epoch: int) -> tuple[Permutation, int]:
        rng = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
        room = len(self.stream) - 1 - self.per_epoch * self.seq_len
        return Permutation(self.per_epoch, self.seed, epoch), int(rng.integers(0, min(room, self.seq_len - 1) + 1))

    def row(self, index: int) -> Row:
        """Row of a global index."""
        order, offset = self._order(index // self.per_epoch)
        start = offset + order[index % self.per_epoch] * self.seq_len
        stop = start + self.seq_len
        ids = self.stream.window(start, stop + 1)
        return Row(ids[:-1], ids[1:], self.stream.documents(start, stop) if self.doc_ids else None)


class HeldoutRows:
    """Consecutive windows: every token but the first is a label exactly once. The last row is padded."""

    def __init__(self, stream: Tokens, seq_len: int, doc_ids: bool = False):
        self.stream, self.seq_len, self.doc_ids = stream, seq_len, doc_ids

    def __len__(self) -> int:
        return -(-(len(self.stream) - 1) // self.seq_len)

    def row(self, index: int) -> Row:
        """Row of an index below len()."""
        start = index * self.seq_len
        stop = start + self.seq_len
        ids = self.stream.window(start, min(stop + 1, len(self.stream))).astype(np.int64)
        inputs, labels = np.full(self.seq_len, ids[0]), np.full(self.seq_len, IGNORE)
        inputs[: len(ids) - 1], labels[: len(ids) - 1] = ids[:-1], ids[1:]
        return Row(inputs, labels, self.stream.documents(start, stop) if self.doc_ids else None)


class TaskRows:
    """Samples of a synthetic task; `split` 0 is for training, others never meet it."""

    def __init__(self, sample: Sample, seed: int, split: int = 0):
        self.sample, self.seed, self.split = sample, seed, split

    def row(self, index: int) -> Row:
        """Row of a global index."""
        counter = np.array([0, 0, index, self.split], np.uint64)
        return Row(*self.sample(np.random.Generator(np.random.Philox(key=[self.seed, 0], counter=counter))))


class PrefixRows:
    """Rows of a model whose first `length` tokens of a text see each other: what they have seen is not asked."""

    def __init__(self, rows: Rows, length: int):
        self.rows, self.length = rows, length

    def row(self, index: int) -> Row:
        """Row of an index of `rows`."""
        row = self.rows.row(index)
        place = np.arange(len(row.labels))
        if row.doc_ids is not None:
            starts = np.flatnonzero(np.diff(row.doc_ids, prepend=row.doc_ids[0] - 1))
            place = place - starts[np.searchsorted(starts, place, side="right") - 1]
        return row._replace(labels=np.where(place < self.length - 1, IGNORE, row.labels.astype(np.int64)))


class Loader:
    """Batches of one process among `world`: process r takes rows n + r * size .. of each `world * size` rows."""

    def __init__(self, rows: Rows, size: int, rank: int = 0, world: int = 1):
        self.rows, self.size, self.rank, self.world = rows, size, rank, world
        self.seen = 0  # rows given out to all processes together

    def __iter__(self) -> Iterator[Batch]:
        while True:
            first = self.seen + self.rank * self.size
            self.seen += self.world * self.size
            yield batch(self.rows, first, self.size)

    def state_dict(self) -> dict[str, Any]:
        """The position, and the rates where they were searched."""
        low, high = getattr(self.rows, "clip", (None, None))
        return {"rows": self.seen} | ({} if low is None else {"low": low, "high": high})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position, of a run on any number of processes."""
        self.seen = int(state["rows"])
        if "low" in state:
            self.rows.clip = float(state["low"]), float(state["high"])  # type: ignore[attr-defined]
