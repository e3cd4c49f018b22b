"""YAML text -> plain Python values, with the place of every key, and without running anything.

Values are built straight from parser events: no tag, no constructor, no recursion, and a budget for aliases,
so that neither a bomb nor a strange tag in a file can do harm.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from zoo.errors import ConfigError, Problem

MAX_BYTES = 256 * 1024
MAX_DEPTH = 48
MAX_VALUES = 100_000

Path_ = tuple[Any, ...]
_INT = re.compile(r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F]+)$")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?$")
_WORDS = {"null": None, "~": None, "": None, "true": True, "false": False, "True": True, "False": False}
_WORDS |= {".inf": float("inf"), "-.inf": float("-inf"), ".nan": float("nan")}


@dataclass
class Source:
    """A document, where it came from, and the place (line, column) of every key and item."""

    file: str = ""
    value: Any = None
    marks: dict[Path_, tuple[int, int]] = field(default_factory=dict)
    overridden: dict[Path_, str] = field(default_factory=dict)

    def problem(self, path: Path_, message: str) -> Problem:
        """A Problem at `path`, or at the nearest place above it that has a mark."""
        where = show_path(path)
        for end in range(len(path), -1, -1):
            if path[:end] in self.overridden:
                return Problem(message, where, f"override {self.overridden[path[:end]]}")
            if path[:end] in self.marks:
                return Problem(message, where, self.file, *self.marks[path[:end]])
        return Problem(message, where, self.file)


def show_path(path: Path_) -> str:
    """('trunk', 0, 'of') -> trunk[0].of"""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def scalar(text: str) -> Any:
    """A plain (unquoted) YAML scalar: null, true/false, integer, number (1e-3 too), else a string."""
    if text in _WORDS:
        return _WORDS[text]
    if _INT.match(text):
        try:
            return int(text.replace("_", ""), 0)
        except ValueError:  # more digits than Python converts
            return text
    return float(text.replace("_", "")) if _FLOAT.match(text) else text


def read_file(path: Path) -> Source:
    """Read a YAML file. ConfigError where it is missing, too large, binary or no valid YAML."""
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ConfigError(
                [Problem(f"the file has {size:,} bytes; a configuration has at most {MAX_BYTES:,}", file=str(path))]
            )
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigError([Problem(f"cannot be read: {error.strerror or error}", file=str(path))]) from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError([Problem(f"is not a text file in UTF-8 (byte {error.start})", file=str(path))]) from None
    return read_text(text, str(path))


def read_text(text: str, file: str = "") -> Source:
    """Read YAML text. See `read_file`."""
    source = Source(file)
    try:
        source.value = _Builder(text, source).build()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        what = getattr(error, "problem", None) or getattr(error, "reason", None) or "not valid YAML"
        place = (mark.line + 1, mark.column + 1) if mark else (None, None)
        raise ConfigError([Problem(f"YAML: {what}", "", file, *place)]) from None
    return source


@dataclass
class _Open:
    """A list or mapping that is being filled."""

    value: Any
    path: Path_
    anchor: str | None
    before: int  # values counted when it began: what it holds is the difference
    key: Any = None
    has_key: bool = False


class _Builder:
    def __init__(self, text: str, source: Source):
        self.events: Iterator[Any] = yaml.parse(text, Loader=yaml.SafeLoader)
        self.source = source
        self.count = 0
        self.anchors: dict[str, tuple[Any, int] | None] = {}
        self.stack: list[_Open] = []
        self.root: Any = None

    def fail(self, event: Any, message: str) -> ConfigError:
        mark = event.start_mark
        where = show_path(self.stack[-1].path) if self.stack else ""
        return ConfigError([Problem(message, where, self.source.file, mark.line + 1, mark.column + 1)])

    def build(self) -> Any:
        documents = 0
        for event in self.events:
            tag = getattr(event, "tag", None)
            if tag not in (None, "!") and isinstance(event, yaml.NodeEvent):
                raise self.fail(event, f"the tag {tag} is not allowed; a configuration holds plain values only")
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise self.fail(event, "the file holds more than one document")
            elif isinstance(event, yaml.ScalarEvent):
                plain = event.implicit[0] and event.style is None
                self.add(event, scalar(event.value) if plain else event.value, event.anchor, 1)
            elif isinstance(event, yaml.AliasEvent):
                known = self.anchors.get(event.anchor)
                if known is None:
                    raise self.fail(event, f"the alias *{event.anchor} is undefined or contains itself")
                self.add(event, known[0], None, known[1])
            elif isinstance(event, (yaml.SequenceStartEvent, yaml.MappingStartEvent)):
                self.open(event)
            elif isinstance(event, (yaml.SequenceEndEvent, yaml.MappingEndEvent)):
                done = self.stack.pop()
                if done.anchor:
                    self.anchors[done.anchor] = (done.value, self.count - done.before)
        return self.root

    def open(self, event: Any) -> None:
        if len(self.stack) >= MAX_DEPTH:
            raise self.fail(event, f"nested deeper than {MAX_DEPTH} levels")
        value: Any = [] if isinstance(event, yaml.SequenceStartEvent) else {}
        before = self.count
        path = self.add(event, value, None, 1)
        if event.anchor:
            self.anchors[event.anchor] = None
        self.stack.append(_Open(value, path, event.anchor, before))

    def add(self, event: Any, value: Any, anchor: str | None, size: int) -> Path_:
        self.count += size
        if self.count > MAX_VALUES:
            raise self.fail(event, f"the aliases expand to more than {MAX_VALUES:,} values")
        if anchor:
            self.anchors[anchor] = (value, size)
        place = (event.start_mark.line + 1, event.start_mark.column + 1)
        if not self.stack:
            self.root = value
            self.source.marks[()] = place
            return ()
        top = self.stack[-1]
        if isinstance(top.value, list):
            path = (*top.path, len(top.value))
            top.value.append(value)
        elif not top.has_key:
            if not isinstance(value, (str, int, float, bool)) and value is not None:
                raise self.fail(event, "a key must be a plain word or number")
            if value in top.value:
                raise self.fail(event, f"the key {value!r} stands here twice")
            top.key, top.has_key = value, True
            self.source.marks[(*top.path, value)] = place
            return (*top.path, value)
        else:
            path, top.has_key = (*top.path, top.key), False
            if top.key == "<<" and isinstance(value, dict):
                top.value.update({k: v for k, v in value.items() if k not in top.value})
            else:
                top.value[top.key] = value
            return path
        self.source.marks[path] = place
        return path
