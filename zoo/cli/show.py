"""`zoo show NAME`: the card of a block, or the text of a configuration."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated, Any

import typer

from zoo.cli import output
from zoo.cli.options import Json
from zoo.registry import Card


def command(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A block, norm, router, combinator or configuration.")],
    as_json: Json = False,
) -> None:
    """Show what is known of a block, or print a configuration."""
    from zoo import registry
    from zoo.errors import ConfigError, Problem, did_you_mean
    from zoo.graph.loader import config_names

    if name in registry.list_blocks():
        return _block(registry.block_card(name), as_json)
    if name not in config_names() and not name.endswith((".yaml", ".yml")):
        hint = did_you_mean(name, [*registry.list_blocks(), *config_names()])
        what = f"is no block and no configuration{hint or '; zoo list names them'}"
        raise ConfigError([Problem(what, file=name)])
    return _config(name, as_json)


def _config(name: str, as_json: bool) -> None:
    from omegaconf import OmegaConf

    from zoo.graph.loader import find_config, load_config

    path = find_config(name)
    config = load_config(path)  # shown only if it is right
    if as_json:
        return output.emit({"config": path.stem, "path": str(path), "document": OmegaConf.to_container(config)})
    print(path.read_text(encoding="utf-8"), end="")


def _block(card: Card, as_json: bool) -> None:
    from zoo.cards import family, option_table

    table, tree = option_table(card.name), family(card.name)
    if as_json:
        document = dataclasses.asdict(card)
        return output.emit(document | {"backends": card.backends, "options": table, "family": tree.as_dict()})
    _print(card, table, tree)


def _print(card: Card, table: list[dict[str, Any]], tree: Any) -> None:
    from rich.text import Text
    from rich.tree import Tree

    console = output.console()
    console.print(
        Text(f"{card.name}  ", style="bold"), Text(f"{card.kind} {card.class_name} of {card.module}", style="dim")
    )
    print(f"\n{card.doc}\n")
    if table:
        rows = [(o["name"], o["type"], "required" if o["required"] else _as_yaml(o["default"])) for o in table]
        output.table(("option", "type", "default"), rows)
        print()
    facts = {"paper": card.paper, "ops": ", ".join(card.ops), "backends": ", ".join(card.backends)}
    if card.kind in ("mixer", "ffn", "memory"):
        facts |= {
            "causal": "yes" if card.causal else "no",
            "streaming": "yes" if card.streaming else "no",
            "state growth": card.state_growth,
        }
    facts |= {"note": card.note, "provider": card.provider}
    output.facts({k: v for k, v in facts.items() if v})
    if tree.special or tree.general:
        print()
        branch = Tree(Text("family (proven by the conformance suite)", style="bold"))
        _grow(branch.add(Text("becomes")) if tree.special else branch, tree.special)
        _grow(branch.add(Text("is what these become")) if tree.general else branch, tree.general)
        console.print(branch)


def _grow(branch: Any, members: Any) -> None:
    from rich.text import Text

    for member in members:
        _grow(branch.add(Text(member.relation)), member.members)


def _as_yaml(value: Any) -> str:
    return json.dumps(value) if value is None or isinstance(value, (bool, list, tuple)) else str(value)
