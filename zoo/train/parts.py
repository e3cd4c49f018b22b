"""How a source is cut into parts that are tokenized one by one, in any order, by any number of processes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from zoo.errors import DataError
from zoo.sections import HUB
from zoo.train.corpus import (
    JSON_LINES,
    PARQUET,
    draw_heldout,
    name_hash,
    parquet_groups,
    parquet_texts,
    source_files,
    text_of_line,
)
from zoo.train.tokens import FORMAT

TRAIN, HELDOUT = SPLITS = ("train", "heldout")
SMALLEST_PART, LARGEST_PART, PARTS = 4 << 20, 256 << 20, 256  # bytes; about so many parts between these sizes
BLOCK = 4 << 20  # a plain text is tokenized in blocks of so many bytes, cut behind a line
_LOOK_BACK = 64 << 10  # for the end of a line


class Segment(NamedTuple):
    """A stretch of one file: bytes of text or JSON lines, row groups of a parquet file."""

    file: int
    begin: int
    end: int
    size: int  # bytes of text, about
    split: str = ""  # of a plain text; records are split one by one
    document: int = 0  # bytes of the document that begins here; 0: none, or many


class Piece(NamedTuple):
    """Text of one document. `document`: its bytes in all where it begins here, else 0."""

    split: str
    text: bytes
    document: int


@dataclass(frozen=True)
class Plan:
    """Which parts a source has. The same source, tokenizer and options give the same plan and `fingerprint`."""

    files: tuple[tuple[str, Path], ...]
    parts: tuple[tuple[Segment, ...], ...]
    heldout: float
    text_key: str
    skipped: int
    fingerprint: str

    def size(self, part: int) -> int:
        """Bytes of text of a part, about."""
        return sum(s.size for s in self.parts[part])

    @property
    def total(self) -> int:
        """Bytes of text in all, about."""
        return sum(map(self.size, range(len(self.parts))))


def plan(source: str, tokenizer_sha256: str, *, heldout: float, text_key: str, part_bytes: int | None = None) -> Plan:
    """Look through a source without reading it into memory.

    Plain texts, each a document, are held out as `read_corpus` does it: by the hash of their names, up to `heldout` of
    the bytes, or else the tail of the longest. Of JSON lines and parquet rows those are held out whose name, which is
    where they stand, hashes into the first `heldout` of all hashes.
    """
    if source.startswith(HUB):
        raise DataError(f"{source}: is a stream; download its parquet files and name their folder")
    files = source_files(source)
    sizes = [_size(path) for _, path in files]
    binary = {i for i, (_, path) in enumerate(files) if _is_plain(path) and _is_binary(path)}
    if binary and len(files) == 1:
        raise DataError(f"{files[0][1]}: is a binary file, not text")
    part_bytes = part_bytes or min(max(sum(sizes) // PARTS, SMALLEST_PART), LARGEST_PART)
    plain = {i: sizes[i] for i, (_, path) in enumerate(files) if _is_plain(path) and sizes[i] and i not in binary}
    cuts = _splits(plain, files, heldout, alone=all(_is_plain(path) for _, path in files))
    segments: list[Segment] = []
    for i, (_, path) in enumerate(files):
        if i in plain:
            for split, begin, end in cuts[i]:
                places = [begin, *_line_ends(path, begin, end, part_bytes), end]
                segments += [
                    Segment(i, a, b, b - a, split, end - begin if a == begin else 0) for a, b in pairwise(places)
                ]
        elif path.suffix == PARQUET:
            segments += [Segment(i, g, g + 1, size) for g, size in enumerate(parquet_groups(path, text_key))]
        elif i not in binary and sizes[i]:
            places = [0, *_record_starts(path, sizes[i], part_bytes), sizes[i]]
            segments += [Segment(i, a, b, b - a) for a, b in pairwise(places)]
    if not segments:
        raise DataError(f"{source}: there is no text in it" + f" ({len(binary)} binary files)" * bool(binary))
    stamps = [(name, sizes[i], path.stat().st_mtime_ns) for i, (name, path) in enumerate(files)]
    about = [FORMAT, tokenizer_sha256, heldout, text_key, part_bytes, stamps]
    fingerprint = hashlib.sha256(json.dumps(about).encode()).hexdigest()
    return Plan(tuple(files), _group(segments, part_bytes), heldout, text_key, len(binary), fingerprint)


def pieces(plan: Plan, part: int) -> Iterator[Piece]:
    """The text of a part."""
    for segment in plan.parts[part]:
        name, path = plan.files[segment.file]
        if segment.split:
            starts = segment.document
            for block in _blocks(path, segment.begin, segment.end):
                yield Piece(segment.split, block, starts)
                starts = 0
            continue
        records = _rows if path.suffix == PARQUET else _lines
        for record, text in records(name, path, segment, plan.text_key):
            if text:
                yield Piece(_split_of(record, plan.heldout), text, len(text))


def _split_of(record: str, heldout: float) -> str:
    return HELDOUT if int.from_bytes(name_hash(record)[:8]) < heldout * 2**64 else TRAIN


def _splits(
    plain: dict[int, int], files: Sequence[tuple[str, Path]], share: float, alone: bool
) -> dict[int, list[tuple[str, int, int]]]:
    """(split, begin, end) of the stretches of each plain text."""
    order = sorted(plain, key=lambda i: (name_hash(files[i][0]), files[i][0]))
    drawn = draw_heldout([(files[i][0], plain[i]) for i in order], share)
    splits = {i: [(HELDOUT if files[i][0] in drawn else TRAIN, 0, plain[i])] for i in plain}
    if plain and alone and not drawn:
        longest = max(order, key=lambda i: plain[i])
        size = plain[longest]
        cut = size - max(1, min(round(share * sum(plain.values())), size - 1))
        cut = _line_end(files[longest][1], cut // 2, cut)
        if cut < 1:
            raise DataError(f"{files[longest][0]}: one byte is too little to train on")
        splits[longest] = [(TRAIN, 0, cut), (HELDOUT, cut, size)]
    return splits


def _group(segments: Sequence[Segment], part_bytes: int) -> tuple[tuple[Segment, ...], ...]:
    parts: list[list[Segment]] = []
    room = 0
    for segment in segments:
        if room < segment.size or not parts:
            parts.append([])
            room = part_bytes
        parts[-1].append(segment)
        room -= segment.size
    return tuple(map(tuple, parts))


# ---------------------------------------------------------------------------------------------- files
def _is_plain(path: Path) -> bool:
    return path.suffix not in (PARQUET, *JSON_LINES)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None


def _is_binary(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return any(b"\0" in block for block in iter(lambda: file.read(1 << 20), b""))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None


def _read(path: Path, begin: int, end: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(begin)
            text = file.read(end - begin)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    if len(text) != end - begin:
        raise DataError(f"{path}: was changed while it was read; prepare it again")
    return text


def _blocks(path: Path, begin: int, end: int) -> Iterator[bytes]:
    """The bytes of a plain text, cut behind lines."""
    places = [begin, *_line_ends(path, begin, end, BLOCK), end]
    return (_read(path, a, b) for a, b in pairwise(places))


def _line_ends(path: Path, begin: int, end: int, step: int) -> Iterator[int]:
    """Places inside begin .. end, at most `step` bytes apart, behind lines."""
    while begin + step < end:
        begin = _line_end(path, begin + step // 2, begin + step)
        yield begin


def _line_end(path: Path, least: int, most: int) -> int:
    """The place behind the last line that ends between two places; without one, where a character begins."""
    least = max(least, most - _LOOK_BACK)
    text = _read(path, least, most + 1)
    if at := text.rfind(b"\n", 0, -1) + 1:
        return least + at
    at = len(text) - 1
    while at > 1 and text[at] & 0xC0 == 0x80:
        at -= 1
    return least + at


def _record_starts(path: Path, end: int, step: int) -> Iterator[int]:
    """Places in a file of JSON lines, at least `step` bytes apart, where a line begins."""
    at = step
    while at < end:
        try:
            with path.open("rb") as file:
                file.seek(at - 1)
                file.readline()
                at = file.tell()
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
        if at < end:
            yield at
        at += step


def _lines(name: str, path: Path, segment: Segment, key: str) -> Iterator[tuple[str, bytes]]:
    """Name and text of each line of a segment."""
    at = segment.begin

    def where() -> str:
        return f"{path}:{_read(path, 0, at).count(bytes([10])) + 1}"

    try:
        with path.open("rb") as file:
            file.seek(at)
            while at < segment.end and (line := file.readline()):
                if line.strip():
                    yield f"{name}@{at}", text_of_line(line, key, where)
                at = file.tell()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    if at != segment.end:
        raise DataError(f"{path}: was changed while it was read; prepare it again")


def _rows(name: str, path: Path, segment: Segment, key: str) -> Iterator[tuple[str, bytes | None]]:
    """Name and text of each row of a row group."""
    for number, text in enumerate(parquet_texts(path, key, [segment.begin])):
        yield f"{name}@{segment.begin}:{number}", text
