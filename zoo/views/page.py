"""One self-contained page: a template, a style, scripts and the data, all in one file."""

from __future__ import annotations

import html
import json
import math
from pathlib import Path
from typing import Any

from zoo.errors import ConfigError

_HERE = Path(__file__).parent
_SCRIPTS = {"profile": ("common.js", "graph.js", "profile.js"), "sweep": ("common.js", "sweep.js")}


def page(script: str, title: str, data: Any) -> str:
    """The page that `script` (`profile` or `sweep`) makes of `data`. No text in it can end a tag."""
    text = json.dumps(finite(data), allow_nan=False, default=str)
    parts = {
        "TITLE": html.escape(title),
        "STYLE": _read("page.css"),
        "DATA": text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029"),
        "SCRIPT": "".join(map(_read, _SCRIPTS[script])),
    }
    pieces = _read("page.html").split("%%")  # text, name, text, name, ..., text: what is put in is not looked at again
    return "".join(parts[piece] if i % 2 else piece for i, piece in enumerate(pieces))


def write(path: str | Path, text: str) -> None:
    """Write a file that the user named. ConfigError where that cannot be."""
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror})") from None


def finite(value: Any) -> Any:
    """JSON has no nan."""
    if isinstance(value, dict):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _read(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")
