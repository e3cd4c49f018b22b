"""A saved model in pieces: each residual block with its tensors, and what stands around the blocks.

The weights of a piece are named as inside it, so that the same block has the same content at every place.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo.architectures.model import Model
from zoo.architectures.storage import (
    CONFIG,
    WEIGHTS,
    assemble,
    check_fit,
    read_tensors,
    saved_in,
    unique_tensors,
    with_tensors,
)
from zoo.convert.folder import beside
from zoo.errors import ConfigError, Problem
from zoo.graph.loader import load_graph
from zoo.graph.nodes import ResidualBlock
from zoo.graph.spec import Graph


@dataclass(frozen=True)
class StoredNode:
    """A block as it was built, as plain values, and its tensors by their names inside it."""

    description: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @property
    def block(self) -> str:
        return self.description["block"]

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    @property
    def likeness(self) -> tuple[str, Any]:
        """Equal where one node's tensors may stand in for the other's."""
        return canonical(self.description), sorted((n, tuple(t.shape)) for n, t in self.tensors.items())

    @cached_property
    def hash(self) -> str:
        """sha256 of the description and of names, types, shapes and bytes of all tensors."""
        made = hashlib.sha256(canonical(self.description).encode())
        for name, tensor in sorted(self.tensors.items()):
            made.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
            made.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return made.hexdigest()


@dataclass(frozen=True)
class Saved:
    """A model as it was saved: the text of its config.yaml, its nodes by path, and files beside it (tokenizer,
    licence) by name. `place` is where it came from, for messages."""

    place: Path
    config: str
    graph: Graph
    nodes: Mapping[str, StoredNode]
    files: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All weights by their names in the model."""
        return {f"{path}.{name}": t for path, node in self.nodes.items() for name, t in node.tensors.items()}

    def model(self) -> Model:
        """The model, in eval() mode."""
        return with_tensors(self.graph, self.tensors, self.place)


def read_saved(directory: str | Path) -> Saved:
    """A saved model or finished run. ConfigError where files are missing, damaged or do not fit."""
    folder = saved_in(directory)
    graph = load_graph(folder / CONFIG)
    tensors = read_tensors(folder / WEIGHTS)
    shapes = nodes_of(assemble(graph))
    own = {f"{path}.{name}": t for path, node in shapes.items() for name, t in node.tensors.items()}
    check_fit(own, tensors, folder / WEIGHTS)
    nodes = {
        path: StoredNode(node.description, {name: tensors[f"{path}.{name}"] for name in node.tensors})
        for path, node in shapes.items()
    }
    try:
        files = {path.name: path.read_bytes() for path in beside(folder)}
        return Saved(folder, (folder / CONFIG).read_text(encoding="utf-8"), graph, nodes, files)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([Problem(f"cannot be read: {error}", file=str(folder))]) from None


def nodes_of(model: Model) -> dict[str, StoredNode]:
    """The nodes of a model that hold tensors, in its order; shared tensors belong to the first that has them."""
    found: dict[str, tuple[nn.Module, dict[str, Tensor]]] = {}
    for name, tensor in unique_tensors(model).items():
        path, module = _owner(model, name)
        found.setdefault(path, (module, {}))[1][name.removeprefix(f"{path}.")] = tensor
    return {path: StoredNode(_describe(path, module), tensors) for path, (module, tensors) in found.items()}


def _owner(model: Model, name: str) -> tuple[str, nn.Module]:
    """The outermost residual block around a tensor; else the innermost component or combinator; else the part of the
    model (embedding, head)."""
    parts = name.split(".")
    found = parts[0], model.get_submodule(parts[0])
    module: Any = model
    for i, part in enumerate(parts[:-1]):
        module = getattr(module, part)
        if hasattr(module, "built_from") or isinstance(module, ResidualBlock):
            found = ".".join(parts[: i + 1]), module
        if isinstance(module, ResidualBlock):
            break
    return found


def _describe(path: str, module: Any) -> dict[str, Any]:
    if not isinstance(module, ResidualBlock):
        return getattr(module, "built_from", {"block": path})
    norms = [norm and norm.built_from for norm in (module.norm, module.out_norm)]
    # how often a row goes without the block in training (drop_path) does not change what the block is
    residual = {"style": module.style, "skip": module.skip, "scale": module.fixed_scale}
    return {**module.block.built_from, "norms": norms, "residual": residual}  # type: ignore[dict-item]


def canonical(description: Mapping[str, Any]) -> str:
    """One text for equal descriptions."""
    return json.dumps(description, sort_keys=True, default=_plain)


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else list(value) if isinstance(value, (tuple, set)) else str(value)


def difference(here: StoredNode, there: StoredNode) -> str:
    """In words, why the second cannot stand in for the first; empty where it can."""
    if here.likeness == there.likeness:
        return ""
    a, b = here.description, there.description
    for key in ("block", "dim"):
        if a.get(key) != b.get(key):
            return f"{_said(a)} against {_said(b)}"
    options = _changed(a.get("options") or {}, b.get("options") or {})
    around = [key for key in ("norms", "residual") if canonical({"": a.get(key)}) != canonical({"": b.get(key)})]
    shapes = "" if options or around else "shapes of tensors"
    return f"{_said(a)}, other {', '.join([*options, *around, *filter(None, [shapes])])}"


def _changed(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterable[str]:
    """Options that differ, with both values."""
    plain = [json.loads(canonical(options)) for options in (a, b)]
    for key in sorted(plain[0].keys() | plain[1].keys()):
        one, two = (p.get(key) for p in plain)
        if one != two:
            yield f"{key} ({one} against {two})"


def _said(description: Mapping[str, Any]) -> str:
    width = description.get("dim")
    return description["block"] + (f" of width {width}" if width else "")
