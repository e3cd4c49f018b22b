"""Write the table of blocks into README.md, between its markers, from the cards. `--check` only compares."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- blocks: written by tools/readme_table.py -->", "<!-- end of blocks -->"
KINDS = {
    "mixer": "Mixers",
    "ffn": "Feed-forward networks",
    "memory": "Memories",
    "router": "Routers of loops and routes",
    "chunker": "Chunkers of hierarchies",
    "norm": "Norms",
    "select": "Policies of attention that select keys (`select:`)",
    "cache": "Policies of attention's cache (`cache:`)",
    "combinator": "Combinators",
}


def paper_link(paper: str) -> str:
    """arXiv:1234.5678 as a link; other references as they are."""
    number = paper.removeprefix("arXiv:")
    return f"[{number}](https://arxiv.org/abs/{number})" if number != paper else paper


def table() -> str:
    """One row per block, in the order of KINDS; kinds not named there come last."""
    from zoo import registry

    cards = [c for c in map(registry.block_card, registry.list_blocks()) if c.provider == "block-zoo"]
    lines = []
    for kind in dict.fromkeys([*KINDS, *sorted(c.kind for c in cards)]):
        members = [c for c in cards if c.kind == kind]
        if members:
            lines += ["", f"| {KINDS.get(kind, kind)} | | state | paper |", "| --- | --- | --- | --- |"]
        for c in members:
            state = {"none": ""}.get(c.state_growth, c.state_growth)
            summary = c.summary.replace("|", "\\|").replace("*", "\\*").replace("_", "\\_")
            lines.append(f"| `{c.name}` | {summary} | {state} | {paper_link(c.paper)} |")
    return "\n".join([*lines[1:], ""])


def renewed(text: str) -> str:
    """README text with a fresh table."""
    before, rest = text.split(BEGIN, 1)
    _, after = rest.split(END, 1)
    return f"{before}{BEGIN}\n{table()}{END}{after}"


def main() -> int:
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    fresh = renewed(text)
    if "--check" in sys.argv:
        print("README.md: " + ("up to date" if fresh == text else "the table of blocks is old; run make docs"))
        return int(fresh != text)
    path.write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
