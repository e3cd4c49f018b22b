"""`zoo list`: names of blocks, from their sources, without importing any."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from zoo.cli import output
from zoo.cli.options import Json


def command(
    kind: Annotated[str | None, typer.Option("--kind", metavar="K", help="Only this kind.")] = None,
    configs: Annotated[bool, typer.Option("--configs", help="The configurations that come with the zoo.")] = False,
    as_json: Json = False,
) -> None:
    """List blocks, norms, routers and combinators."""
    from zoo import registry

    if configs:
        found = [_config(p) for p in _config_files()]
        return (
            output.emit(found)
            if as_json
            else output.table(("config", "description"), [tuple(c.values()) for c in found])
        )
    cards = [registry.block_card(n) for n in registry.list_blocks(kind)]
    if as_json:
        keys = ("name", "kind", "summary", "paper", "causal", "streaming", "state_growth", "provider")
        return output.emit([{k: getattr(c, k) for k in keys} for c in cards])
    cards.sort(key=lambda c: (registry.KINDS.index(c.kind), c.name))
    output.table(("name", "kind", "summary"), [(c.name, c.kind, c.summary) for c in cards])
    print(f"\n{len(cards)} names; zoo show NAME tells more; zoo list --configs lists configurations")


def _config_files() -> list[Path]:
    return sorted((Path(__file__).resolve().parents[1] / "configs").glob("*.yaml"))


def _config(path: Path) -> dict[str, Any]:
    """Name, and the first sentence of the comment that the file begins with."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
    comment = " ".join(line.lstrip("# ") for line in lines)
    return {"name": path.stem, "description": re.split(r"(?<=[.:;]) (?=[A-Z`\d])", comment)[0].rstrip(".:;")}
