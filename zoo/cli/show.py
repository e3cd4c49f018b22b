"""`zoo show NAME`: the card of a block, or the text of a configuration."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
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
    from zoo.family import family
    from zoo.registry import CONTEXT_OPTIONS, options

    hidden = () if card.kind == "combinator" else CONTEXT_OPTIONS
    table = [_option(o) for o in options(card.name).values() if o.name not in hidden]
    tree = family(card.name)
    if as_json:
        document = dataclasses.asdict(card)
        return output.emit(document | {"backends": card.backends, "options": table, "family": tree.as_dict()})
    _print(card, table, tree)


def _option(option: Any) -> dict[str, Any]:
    row = {"name": option.name, "type": _type_in_words(option.annotation), "required": option.required}
    return row if option.required else row | {"default": option.default}


def _print(card: Card, table: list[dict[str, Any]], tree: Any) -> None:
    from rich.text import Text
    from rich.tree import Tree

    console = output.console()
    console.print(
        Text(f"{card.name}  ", style="bold"), Text(f"{card.kind} {card.class_name} of {card.module}", style="dim")
    )
    console.print()
    console.print(card.doc)
    console.print()
    if table:
        rows = [(o["name"], o["type"], "required" if o["required"] else _as_yaml(o["default"])) for o in table]
        output.table(("option", "type", "default"), rows)
        console.print()
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
        console.print()
        branch = Tree(Text("family (proven by the conformance suite)", style="bold"))
        _grow(branch.add(Text("becomes")) if tree.special else branch, tree.special)
        _grow(branch.add(Text("is what these become")) if tree.general else branch, tree.general)
        console.print(branch)


def _grow(branch: Any, members: Any) -> None:
    from rich.text import Text

    for member in members:
        _grow(branch.add(Text(member.relation)), member.members)


def _type_in_words(annotation: Any) -> str:
    """An option's type with its bounds: `an integer >= 1 or null`."""
    from zoo.registry import Range, type_name

    args = typing.get_args(annotation)
    if hasattr(annotation, "__metadata__"):
        signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
        given = [dataclasses.asdict(m) for m in annotation.__metadata__ if isinstance(m, Range)]
        bounds = ", ".join(f"{signs[k]} {v:g}" for d in given for k, v in d.items() if v is not None)
        return f"{_type_in_words(args[0])} {bounds}".strip()
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return " or ".join(map(_type_in_words, args))
    if typing.get_origin(annotation) in (list, tuple) and args:
        return f"a list of {_type_in_words(args[0])}"
    return type_name(annotation)


def _as_yaml(value: Any) -> str:
    return json.dumps(value) if value is None or isinstance(value, (bool, list, tuple)) else str(value)
