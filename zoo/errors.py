"""Errors a user can meet. Each says what was seen, where, and what would be right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a configuration.

    `where` is the path of the key inside the document (`trunk[0].of[3].moba.topk`); `line` and `column`
    count from 1 and are None where the value came from an override or from Python.
    """

    message: str
    where: str = ""
    file: str = ""
    line: int | None = None
    column: int | None = None

    def __str__(self) -> str:
        place = self.file or "config"
        if self.line is not None:
            place += f":{self.line}:{self.column}"
        return f"{place} {self.where}: {self.message}" if self.where else f"{place}: {self.message}"


class ZooError(Exception):
    """Base of the errors that are shown without a traceback."""


class ConfigError(ZooError, ValueError):
    """A configuration cannot be used. Carries every problem found, not only the first."""

    def __init__(self, problems: Sequence[Problem] | str):
        self.problems = [Problem(problems)] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(map(str, self.problems)))


class KernelUnavailable(ZooError, RuntimeError):
    """A kernel backend was asked for that cannot run this call here; the message gives the reason."""


class DataError(ZooError, ValueError):
    """A data file or folder cannot be used."""


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """Return `; did you mean X?` for the nearest candidate, or the empty string."""
    close = difflib.get_close_matches(str(name), [str(c) for c in candidates], n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def one_of(candidates: Iterable[object]) -> str:
    """Return `one of a, b, c` for a message that lists the allowed values."""
    return "one of " + ", ".join(str(c) for c in candidates)


def few(names: Sequence[object], most: int = 3) -> str:
    """Return `a, b, c and 9 more` for a message that cannot list them all."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more
