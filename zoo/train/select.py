"""Parts of a model by name, as a recipe names them."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

from zoo.errors import ConfigError, Problem, did_you_mean


def modules(model: nn.Module, pattern: str) -> dict[str, nn.Module]:
    """Path and module of every node that `pattern` names: by a path, in which `*` stands for one part and `**` for
    any number, or by the type of block it is. What lies below a node is not listed; a shared node is listed once."""
    path = re.compile(_expression(pattern))
    found: dict[int, tuple[str, nn.Module]] = {}
    for name, module in _paths(model):
        if path.fullmatch(name) or kind(module) == pattern:
            found.setdefault(id(module), (name, module))
    return dict(found.values())


def parameters(model: nn.Module, pattern: str) -> set[str]:
    """Names of all parameters in the nodes that `pattern` names, and of those that it names themselves."""
    path = re.compile(_expression(pattern))
    wanted = {id(p) for m in modules(model, pattern).values() for p in m.parameters()}
    for name, module in _paths(model):
        for own, p in module.named_parameters(name, recurse=False):
            if path.fullmatch(own):
                wanted.add(id(p))
    return {name for name, p in model.named_parameters() if id(p) in wanted}


def kind(module: nn.Module) -> str:
    """The registered name of a block, norm, router or combinator; else the empty string."""
    registration = getattr(module, "zoo_registration", None)
    return registration.name if registration else ""


def nothing(model: nn.Module, pattern: str, where: str) -> ConfigError:
    """The error for a pattern that names nothing."""
    known = {name for name, _ in _paths(model)} | {kind(m) for m in model.modules()} - {""}
    known |= {name for name, _ in model.named_parameters()}
    hint = did_you_mean(pattern, known)
    if not hint:
        hint = "; blocks of this model: " + ", ".join(sorted({kind(m) for m in model.modules()} - {""}))
    return ConfigError([Problem(f"nothing in the model is called {pattern!r}{hint}", where)])


def _paths(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    # a module that several nodes share has several paths
    return ((name, module) for name, module in model.named_modules(remove_duplicate=False) if name)


def _expression(pattern: str) -> str:
    *before, last = pattern.split(".")
    parts = [r"(?:[^.]+\.)*" if part == "**" else _part(part) + r"\." for part in before]
    return "".join(parts) + (".+" if last == "**" else _part(last))


def _part(glob: str) -> str:
    return re.escape(glob).replace(r"\*", "[^.]*").replace(r"\?", "[^.]")
