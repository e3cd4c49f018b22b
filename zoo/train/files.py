"""Files that are either whole or absent, and disk errors told in one line."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from zoo.errors import ZooError


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an OSError inside into one ZooError that names the path."""
    try:
        yield
    except OSError as error:
        raise ZooError(f"{path}: cannot be written: {error.strerror or error}") from error


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A path to write to; on success it becomes `path`, on failure nothing stays."""
    temporary = path.with_name(f".{path.name}.tmp{path.suffix}")
    with disk_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a whole text file."""
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill; on success it takes the place of `path`, on failure nothing stays."""
    temporary = path.with_name(f".{path.name}.tmp")
    with disk_errors(path):
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            yield temporary
            take_place(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def take_place(temporary: Path, path: Path) -> None:
    """Give a complete folder its name, in place of one that may have it."""
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        os.replace(path, old)
    try:
        os.replace(temporary, path)
    except OSError:
        if old.exists():
            os.replace(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)
