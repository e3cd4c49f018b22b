"""The configuration of a `zoo.Model` whose blocks are replaced."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from zoo import registry
from zoo.architectures.model import Model
from zoo.convert.rules import residual_blocks
from zoo.errors import ConfigError
from zoo.graph.loader import load_graph
from zoo.graph.spec import Spec
from zoo.registry import CONTEXT_OPTIONS


def sites_of(model: Model) -> list[tuple[Spec, str]]:
    """Every residual block of a model: its part of the configuration, and its name. ConfigError where blocks share
    weights or stand in a loop, so that sites and parts are not one to one."""
    trunk = load_graph(dict(model.config)).trunk
    specs = [s for item in trunk for s in item.walk() if s.kind != "combinator"]
    names = residual_blocks(model)
    if len(specs) != len(names):
        raise ConfigError("blocks of this model share weights: replace them in its configuration")
    return list(zip(specs, names, strict=True))


def rewritten(model: Model, block: str, options: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The configuration with `block` at the sites that `options` names. ConfigError where a line of the configuration
    means other sites too."""
    document = copy.deepcopy(dict(model.config))
    lines: dict[tuple, list[str]] = {}
    for spec, name in sites_of(model):
        lines.setdefault(spec.path, []).append(f"{name}.block")
    known = {site for sites in lines.values() for site in sites}
    if strange := options.keys() - known:
        raise ConfigError(f"{min(strange)} is no block of the graph; its blocks are called {min(known)} and so on")
    for path, sites in lines.items():
        chosen = [dict(options[s]) for s in sites if s in options]
        if not chosen:
            continue
        if len(chosen) < len(sites):
            rest = next(s for s in sites if s not in options)
            where = ".".join(map(str, path))
            raise ConfigError(f"{where} of the configuration also means {rest}: replace both, or write the layers out")
        _set(document, path, block, {k: v for k, v in chosen[0].items() if k not in CONTEXT_OPTIONS})
    return document


def _set(document: Any, path: tuple, block: str, options: dict[str, Any]) -> None:
    *parents, last = path
    holder = document
    for key in parents:
        holder = holder[key]
    if isinstance(last, str) and last in registry.list_blocks() and isinstance(holder, dict):
        entries = [(block, options) if k == last else (k, v) for k, v in holder.items()]
        holder.clear()
        holder.update(entries)
    else:
        holder[last] = {block: options}
