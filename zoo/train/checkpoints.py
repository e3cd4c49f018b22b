"""Checkpoint folders: whole or absent, known by the sums of their files, the newest good one first.

All ranks write into one hidden folder. Each sums up its own files; then the first rank writes them into manifest.json
and gives the folder its name, step-N, from which moment it is a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from zoo.errors import ZooError
from zoo.train.files import take_place

MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d+)")


class Save:
    """One checkpoint on its way to `path`: write into `temporary` inside `checked()`, then `commit()`.

    group: of all ranks, None for the default one. keep: how many complete checkpoints stay, 0 for all.
    """

    def __init__(self, path: Path, group: Any = None, keep: int = 0):
        self.path, self.group, self.keep = path, group, keep
        self.temporary = path.with_name(f".{path.name}.tmp")
        self.rank, self.world = _place(group)
        self._first(self._begin)

    def _begin(self) -> None:
        shutil.rmtree(self.temporary, ignore_errors=True)
        self.temporary.mkdir(parents=True)

    @contextmanager
    def checked(self) -> Iterator[None]:
        """What goes wrong inside, on whichever rank, is one ZooError on all; nothing of the checkpoint stays."""
        from torch.distributed.checkpoint.api import CheckpointException  # slow to load; who saves has it

        try:
            yield
        except CheckpointException as error:
            cause = next((c for c, _ in error.failures.values()), error)
            raise self._failed(getattr(cause, "strerror", None) or str(cause).strip().split("\n")[0]) from error
        except OSError as error:
            raise self._failed(error.strerror or str(error)) from error

    def commit(self) -> None:
        """Every rank has written: make it a checkpoint, and drop those that are too many."""
        with self.checked():
            mine = {p.name: [p.stat().st_size, _sum(p)] for p in self._written()}
        parts: list[Any] = [mine]
        if self.world > 1:
            parts = [None] * self.world
            dist.all_gather_object(parts, mine, group=self.group)
        files = {name: entry for part in parts for name, entry in part.items()}
        self._first(lambda: self._publish(files))

    def commit_after(self, future: Future) -> Future:
        """The same as soon as a save in the background is done; the future says how that went."""
        done: Future = Future()

        def finish(written: Future) -> None:
            try:
                with self.checked():
                    written.result()
                self.commit()
            except BaseException as error:  # it belongs to whoever waits
                done.set_exception(error)
            else:
                done.set_result(None)

        future.add_done_callback(finish)
        return done

    def _written(self) -> Iterator[Path]:
        """This rank's files; what belongs to nobody is the first rank's."""
        for path in sorted(self.temporary.iterdir()):
            numbered = re.match(r"__(\d+)_", path.name)
            if (int(numbered[1]) if numbered else 0) == self.rank:
                yield path

    def _publish(self, files: dict[str, list]) -> None:
        text = json.dumps({"files": {n: {"bytes": size, "sha256": s} for n, (size, s) in files.items()}}, indent=1)
        (self.temporary / MANIFEST).write_text(text, encoding="utf-8")
        take_place(self.temporary, self.path)
        purge(self.path, self.keep)

    def _first(self, act: Callable[[], None]) -> None:
        """The first rank acts; if it cannot, all know."""
        said: list[str | None] = [None]
        if self.rank == 0:
            try:
                act()
            except OSError as error:
                said = [error.strerror or str(error)]
        if self.world > 1:
            dist.broadcast_object_list(said, src=0, group=self.group)
        if said[0] is not None:
            raise self._failed(said[0])

    def _failed(self, why: str) -> ZooError:
        if self.rank == 0:
            shutil.rmtree(self.temporary, ignore_errors=True)
        return ZooError(f"{self.path}: the checkpoint cannot be written: {why}")


def _place(group: Any = None) -> tuple[int, int]:
    """(rank, number of ranks)"""
    return (dist.get_rank(group), dist.get_world_size(group)) if dist.is_initialized() else (0, 1)


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _steps(folder: Path) -> dict[int, Path]:
    """Folders with the name of a checkpoint, the newest first."""
    found = {int(m[1]): p for p in folder.glob("step-*") if (m := _NAME.fullmatch(p.name))}
    return dict(sorted(found.items(), reverse=True))


def purge(newest: Path, keep: int) -> None:
    """Of the complete checkpoints up to `newest` keep so many. What is removed loses its name first."""
    last = int(newest.name.removeprefix("step-"))
    complete = [p for step, p in _steps(newest.parent).items() if step <= last and (p / MANIFEST).is_file()]
    for path in complete[keep:] if keep else []:
        hidden = path.with_name(f".{path.name}.old")
        shutil.rmtree(hidden, ignore_errors=True)
        path.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def clear_leftovers(folder: Path) -> None:
    """Remove what a killed run was writing or removing."""
    if _place()[0] == 0:
        for left in folder.glob(".step-*"):
            shutil.rmtree(left, ignore_errors=True)


def fault(path: Path) -> str | None:
    """Why a folder is no good checkpoint; None for one that is. Several ranks share the reading."""
    try:
        files = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MANIFEST} cannot be read"
    for name, entry in files.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if (size := (path / name).stat().st_size) != entry["bytes"]:
            return f"{name} has {size:,} bytes instead of {entry['bytes']:,}"
    rank, world = _place()
    mine = next((n for n, entry in [*files.items()][rank::world] if _differs(path / n, entry["sha256"])), None)
    found: list[str | None] = [mine]
    if world > 1:
        found = [None] * world
        dist.all_gather_object(found, mine)
    bad = next((n for n in found if n), None)
    return bad and f"the content of {bad} is not what was written"


def _differs(path: Path, wanted: str) -> bool:
    try:
        return _sum(path) != wanted
    except OSError:
        return True


def newest_checkpoint(folder: Path, say: Callable[[str], None] = lambda text: None) -> int | None:
    """Step of the newest good checkpoint under a run folder; `say` hears of those that are passed over.

    None where none was ever written; ZooError where there are some and none is good.
    """
    faults = []
    for step, path in _steps(folder / "checkpoint").items():
        if (why := fault(path)) is None:
            return step
        faults.append(f"{path.name}: {why}")
        say(f"checkpoint passed over: {faults[-1]}")
    if faults:
        raise ZooError(f"{folder} has no checkpoint that can be read ({'; '.join(faults)})")
    return None
