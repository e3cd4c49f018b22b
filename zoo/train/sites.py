"""The rows of `zoo build`'s table, found again in a model that trains."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import nn


class Site(NamedTuple):
    """A node: its path as `zoo build` shows it, what it is, and the name of its module."""

    path: str
    block: str
    module: str


def sites_of(model: Any) -> list[Site]:
    """Every node of a model once, in order; a shared one stands under its first path. Meta models are enough."""
    names = {id(module): name for name, module in model.named_modules()}
    first, *last = model.ends(1, 1, "train")
    found: dict[str, Site] = {}
    for leaf in (first, *model.leaves(1, 1, 0, "train"), *last):
        name = names[id(leaf.module)]
        found.setdefault(name, Site(leaf.path, leaf.block, name))
    return list(found.values())


def owner(name: str, sites: Iterable[Site]) -> Site | None:
    """The innermost node that holds a module or parameter of this name."""
    holders = [s for s in sites if name == s.module or name.startswith(f"{s.module}.")]
    return max(holders, key=lambda s: len(s.module), default=None)


def modules_of(sites: Iterable[Site], parts: Iterable[nn.Module]) -> dict[Site, nn.Module]:
    """The modules of those nodes that this process holds."""
    held = {name: module for part in parts for name, module in part.named_modules()}
    return {s: held[s.module] for s in sites if s.module in held}
