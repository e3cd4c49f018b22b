"""`zoo data prepare`: a source becomes a folder of tokens, in parts that are each whole or absent.

Part n is written as train-n and heldout-n (`zoo.train.tokens`) and then recorded in part-n.json; the index is written
when all parts are there. So a run that was killed goes on with the parts that are missing.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Self

import numpy as np

from zoo.errors import ConfigError, DataError, ZooError
from zoo.train.files import disk_errors, write_text
from zoo.train.parts import HELDOUT, SPLITS, TRAIN, Piece, Plan, pieces, plan
from zoo.train.progress import Reporter
from zoo.train.tokenizer import FileTokenizer, Tokenizer, load_tokenizer
from zoo.train.tokens import FORMAT, INDEX, Prepared, Shard, index_text, is_prepared

PLAN = "plan.json"
_BATCH_BYTES, _BATCH_PIECES = 1 << 20, 1024  # given to the tokenizer together
_MIB = 1 << 20


def prepare_tokens(
    source: str,
    out: Path,
    *,
    tokenizer: str = "bytes",
    heldout: float = 0.05,
    text_key: str = "text",
    workers: int = 1,
    report: Reporter | None = None,
    part_bytes: int | None = None,
) -> Prepared:
    """Tokenize the source (what `data.source` names, but tasks) into the folder `out`, or go on with it.

    What is written depends neither on `workers` nor on where an earlier run was stopped. DataError and ZooError say
    what went wrong; finished parts stay.
    """
    report = report or Reporter(False)
    model = load_tokenizer(tokenizer)
    report.begin("looking through the source")
    cut = plan(source, model.sha256, heldout=heldout, text_key=text_key, part_bytes=part_bytes)
    report.end()
    if _is_finished(out, cut):
        return Prepared(out)
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    with _alone(out):
        _go_on(cut, source, tokenizer, model, out, workers, report)
    return Prepared(out)


def _go_on(cut: Plan, source: str, tokenizer: str, model: Tokenizer, out: Path, workers: int, report: Reporter) -> None:
    write_text(out / PLAN, json.dumps({"fingerprint": cut.fingerprint, "source": source, "parts": len(cut.parts)}))
    missing = [n for n in range(len(cut.parts)) if not (out / _record(n)).is_file()]
    left = sum(map(cut.size, missing))
    advance = count_bytes(report, "tokenizing", cut.total, cut.total - left)
    with disk_errors(out):
        _write_all(cut, missing, tokenizer, out, workers, advance)
        if isinstance(model, FileTokenizer):
            shutil.copyfile(model.path, out / "tokenizer.json")
    _finish(cut, source, tokenizer, model, out)
    advance(left)


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """No second process writes the same folder."""
    with (out / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{out}: another process is preparing it") from None
        yield


def count_bytes(report: Reporter, what: str, total: int, before: int = 0) -> Callable[[int], None]:
    """Begin a phase of `total` bytes, `before` of them done. Gives what is to be told the bytes done since then."""
    report.begin(what, -(-total // _MIB), before // _MIB)
    start, said = time.monotonic(), -1

    def advance(done: int) -> None:
        nonlocal said
        now = (before + done) // _MIB if before + done < total else -(-total // _MIB)
        if now != said:
            said = now
            report.advance(now, f"MiB  {done / _MIB / max(time.monotonic() - start, 1e-3):,.1f} MiB/s")

    return advance


def _is_finished(out: Path, cut: Plan) -> bool:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not is_prepared(str(out)):
        raise ConfigError(f"{out} is not an empty folder: give another --out")
    done = (out / INDEX).is_file()
    try:
        begun = json.loads((out / (INDEX if done else PLAN)).read_text(encoding="utf-8"))["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        begun = None
    if begun != cut.fingerprint:
        what = "holds" if done else "holds a part of"
        raise ConfigError(f"{out} {what} other tokens (source, tokenizer or options differ): give another --out")
    return done


def _write_all(
    cut: Plan, missing: list[int], tokenizer: str, out: Path, workers: int, advance: Callable[[int], None]
) -> None:
    done = 0
    if workers <= 1:
        _begin_worker(cut, tokenizer, out, None)
        for n in missing:
            _write_part(n, lambda more, done=done: advance(done + more))
            done += cut.size(n)
            advance(done)
        return
    arguments = (cut, tokenizer, out, os.getpid())
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _begin_worker, arguments)
    try:
        futures = {pool.submit(_write_part, n): n for n in missing}
        for future in as_completed(futures):
            future.result()
            done += cut.size(futures[future])
            advance(done)
    except BrokenProcessPool:
        raise ZooError(f"{out}: a worker was killed, by the lack of memory perhaps; run it again to go on") from None
    finally:
        pool.shutdown(cancel_futures=True)


# --------------------------------------------------------------------------------------------- worker
_work: tuple[Plan, Tokenizer, Path] | None = None


def _begin_worker(cut: Plan, tokenizer: str, out: Path, parent: int | None) -> None:
    global _work
    if parent is not None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are parallel enough
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent tells when to stop
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    _work = cut, load_tokenizer(tokenizer), out


def _end_with(parent: int) -> None:
    """A worker must not outlive a parent that was killed: it would write what the next run writes."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _write_part(number: int, advance: Callable[[int], None] = lambda done: None) -> None:
    assert _work is not None
    cut, tokenizer, out = _work
    done = 0
    with ExitStack() as stack:
        writers = {s: stack.enter_context(_Writer(out, f"{s}-{number:05}", tokenizer)) for s in SPLITS}
        for batch in _batches(pieces(cut, number)):
            for piece, ids in zip(batch, tokenizer.encode([p.text for p in batch]), strict=True):
                writers[piece.split].add(piece, ids)
                done += len(piece.text)
            advance(min(done, cut.size(number)))
        shards = {s: w.finish() for s, w in writers.items()}
    write_text(out / _record(number), json.dumps({s: shard and asdict(shard) for s, shard in shards.items()}))


def _batches(found: Iterator[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    size = 0
    for piece in found:
        batch.append(piece)
        size += len(piece.text)
        if size >= _BATCH_BYTES or len(batch) >= _BATCH_PIECES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _Writer:
    """A shard on its way to disk. Its files take their names in `finish`; without it nothing stays."""

    def __init__(self, folder: Path, name: str, tokenizer: Tokenizer):
        self.folder, self.name, self.end = folder, name, tokenizer.end
        self.dtype = dtype_of(tokenizer)
        self.path = folder / f".{name}.tmp"
        self.digest = hashlib.sha256()
        self.tokens = self.bytes = 0
        self.docs: list[tuple[int, int]] = []

    def __enter__(self) -> Self:
        self.file = self.path.open("wb")
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()
        self.path.unlink(missing_ok=True)

    def add(self, piece: Piece, ids: np.ndarray) -> None:
        """Append a text."""
        if piece.document:
            self.docs.append((self.tokens, piece.document))
            self._write(np.array([self.end]))
        self._write(ids)
        self.bytes += len(piece.text)

    def _write(self, ids: np.ndarray) -> None:
        raw = ids.astype(self.dtype).tobytes()
        self.file.write(raw)
        self.digest.update(raw)
        self.tokens += len(ids)

    def finish(self) -> Shard | None:
        """Put the files of the shard into place, where there are tokens."""
        self.file.close()
        if not self.tokens:
            return None
        docs = np.asarray(self.docs, np.int64).tobytes()
        temporary = self.path.with_suffix(".docs.tmp")
        temporary.write_bytes(docs)
        os.replace(temporary, self.folder / f"{self.name}.docs")
        os.replace(self.path, self.folder / f"{self.name}.bin")
        digests = self.digest.hexdigest(), hashlib.sha256(docs).hexdigest()
        return Shard(self.name, self.tokens, len(self.docs), self.bytes, *digests)


def dtype_of(tokenizer: Tokenizer) -> np.dtype:
    """The smallest type that holds every token."""
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")


# ---------------------------------------------------------------------------------------------- index
def _record(part: int) -> str:
    return f"part-{part:05}.json"


def _finish(cut: Plan, source: str, name: str, tokenizer: Tokenizer, out: Path) -> None:
    splits: dict[str, list[Shard]] = {s: [] for s in SPLITS}
    for n in range(len(cut.parts)):
        record = json.loads((out / _record(n)).read_text(encoding="utf-8"))
        for split, shard in record.items():
            if shard:
                splits[split].append(Shard(**shard))
    for split, why in ((TRAIN, "lower"), (HELDOUT, "raise")):
        if not splits[split]:
            what = "to train on" if split == TRAIN else "held out"
            raise DataError(f"{source}: no document is {what} at a share of {cut.heldout}: {why} --heldout, new --out")
        with disk_errors(out), _Writer(out, f"{split}-end", tokenizer) as writer:  # the end of the last document
            writer._write(np.array([tokenizer.end]))
            end = writer.finish()
        splits[split].append(end)  # type: ignore[arg-type]
    index: dict[str, Any] = {
        "format": FORMAT,
        "dtype": dtype_of(tokenizer).str,
        "tokenizer": {
            "name": name,
            "sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size,
            "end": tokenizer.end,
        },
        "source": source,
        "heldout": cut.heldout,
        "text_key": cut.text_key,
        "skipped_files": cut.skipped,
        "fingerprint": cut.fingerprint,
    }
    write_text(out / INDEX, index_text(index, splits))
    for left in (*out.glob("part-*.json"), *out.glob(".*.tmp"), out / PLAN, out / ".lock"):
        left.unlink(missing_ok=True)
