"""Write docs/blocks/NAME.md from every card, and an index of them. What a card lacks is an error.

python tools/build_docs.py [FOLDER]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from readme_table import KINDS, paper_link

ROOT = Path(__file__).resolve().parents[1]


def page(name: str) -> str:
    """The page of one block."""
    from zoo import registry
    from zoo.cards import family, option_table

    card, tree = registry.block_card(name), family(name)
    parts = [f"# {name}", f"{card.kind}, class `{card.class_name}` of `{card.module}`" + _paper(card.paper)]
    parts.append(f"```text\n{card.doc}\n```")
    rows = option_table(name)
    if rows:
        lines = ["| option | type | default |", "| --- | --- | --- |"]
        for o in rows:
            default = "required" if o["required"] else f"`{json.dumps(o['default'])}`"
            lines.append(f"| `{o['name']}` | {o['type']} | {default} |")
        parts.append("\n".join(lines))
    if card.kind in ("mixer", "ffn", "memory"):
        facts = {
            "causal": "yes" if card.causal else "no",
            "streaming": "yes" if card.streaming else "no",
            "growth of the state": card.state_growth,
            "ops": ", ".join(card.ops) or "none",
            "backends": ", ".join(card.backends) or "plain torch",
        }
        parts.append("\n".join(f"- {k}: {v}" for k, v in facts.items()))
    if card.note:
        parts.append(f"Note: {card.note}.")
    for title, members in (("Becomes", tree.special), ("Is what these become", tree.general)):
        if members:
            parts.append(f"## {title}\n\n" + "\n".join(_tree(members)))
    return "\n\n".join(parts) + "\n"


def _paper(paper: str) -> str:
    return f", {paper_link(paper)}" if paper else ""


def _tree(members: Any, depth: int = 0) -> list[str]:
    return [line for m in members for line in (f"{'  ' * depth}- `{m.relation}`", *_tree(m.members, depth + 1))]


def complaints(name: str) -> list[str]:
    """What is missing on a card."""
    from zoo import registry

    card = registry.block_card(name)
    found = []
    if not card.summary.endswith((".", "!", ")")) or len(card.summary) < 20:
        found.append("the docstring begins with one sentence that says what it is")
    if card.kind in ("mixer", "ffn", "memory") and "->" not in card.doc:
        found.append("the docstring gives shapes, as in x: [B, T, D] -> y: [B, T, D]")
    return [f"{name}: {text}" for text in found]


def build(folder: Path) -> list[str]:
    """Write all pages; return what is wrong with the cards."""
    from zoo import registry

    folder.mkdir(parents=True, exist_ok=True)
    problems, index = (
        [],
        ["# Blocks", "", "Written by `make docs` from the cards; `zoo show NAME` prints the same.", ""],
    )
    cards = [c for c in map(registry.block_card, registry.list_blocks()) if c.provider == "block-zoo"]
    for kind in dict.fromkeys([*KINDS, *sorted(c.kind for c in cards)]):
        members = [c for c in cards if c.kind == kind]
        index += [f"## {KINDS.get(kind, kind)}", ""] if members else []
        for card in members:
            (folder / f"{card.name}.md").write_text(page(card.name), encoding="utf-8")
            index.append(f"- [{card.name}]({card.name}.md): {card.summary}")
            problems += complaints(card.name)
        index += [""] if members else []
    (folder / "README.md").write_text("\n".join(index), encoding="utf-8")
    return problems


def main() -> int:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "blocks"
    problems = build(folder)
    for text in problems:
        print(text, file=sys.stderr)
    print(f"{folder}: {len(list(folder.glob('*.md'))) - 1} pages", file=sys.stderr)
    return int(bool(problems))


if __name__ == "__main__":
    raise SystemExit(main())
