"""Names of blocks. `@register("gla", kind="mixer", paper=...)` on a class is all that a new block needs.

`list_blocks` and cards read the sources with `ast`, so they import neither torch nor any block; a block's
module is imported when the block is first used. Third parties register through the entry-point group
`zoo.blocks` (entry-point name = block name, value = `package.module:Class`).
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import types
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from zoo.errors import ConfigError, did_you_mean, one_of
from zoo.schema import check_type

KINDS = (
    "mixer", "ffn", "norm", "position", "router", "chunker", "memory", "linear", "select",
    "cache", "merge", "embedding", "head", "combinator",
)  # fmt: skip
# kinds that are no blocks but values of an option of attention, of the same name
COMPONENTS = ("select", "cache")
ENTRY_POINTS = "zoo.blocks"
_SCANNED_PACKAGES = ("blocks", "graph")
# set by the graph, never by a config: they follow from where the block or router stands
CONTEXT_OPTIONS = ("layer_index", "num_layers", "steps", "nested", "value_residual")
_NOT_OPTIONS = ("self", "dim", "device", "dtype")
_Class = TypeVar("_Class", bound=type)


@dataclass(frozen=True)
class Registration:
    """What `@register` says of a class."""

    name: str
    kind: str
    paper: str = ""
    ops: tuple[str, ...] = ()  # ops of zoo.kernels it runs on; their backends are the block's backends
    causal: bool = True
    streaming: bool = True
    state_growth: Literal["none", "constant", "window", "linear"] = "none"
    # proven by the conformance suite: "gla(gate='none') == linear_attention()"; weights are copied by name, limits of
    # parameters stand behind `at` (zoo.relation)
    relations: tuple[str, ...] = ()
    # options under which the conformance suite runs the block at dim 64
    examples: tuple[Mapping[str, Any], ...] = ({},)
    note: str = ""  # why a law does not hold, where one does not


@dataclass(frozen=True)
class Card(Registration):
    """A registration with where it stands and what its docstring says."""

    summary: str = ""
    doc: str = ""
    module: str = ""
    class_name: str = ""
    provider: str = "block-zoo"

    @property
    def backends(self) -> tuple[str, ...]:
        """Kernel backends known for the block's ops (imports torch)."""
        if not self.ops:
            return ()
        from importlib import import_module

        dispatch = import_module("zoo.kernels.dispatch")
        return tuple(dict.fromkeys(b for op in self.ops for b in dispatch.backends(op)))


def register(
    name: str,
    *,
    kind: str,
    paper: str = "",
    ops: tuple[str, ...] = (),
    causal: bool = True,
    streaming: bool = True,
    state_growth: Literal["none", "constant", "window", "linear"] = "none",
    relations: tuple[str, ...] = (),
    examples: tuple[Mapping[str, Any], ...] = ({},),
    note: str = "",
) -> Callable[[_Class], _Class]:
    """Give a class its name in configurations. Arguments must be literals: they are read without importing."""
    if kind not in KINDS:
        raise ValueError(f"kind of {name!r} must be one of {KINDS}, got {kind!r}")
    registration = Registration(
        name, kind, paper, tuple(ops), causal, streaming, state_growth, tuple(relations), tuple(examples), note
    )

    def mark(cls: _Class) -> _Class:
        cls.zoo_registration = registration  # type: ignore[attr-defined]
        return cls

    return mark


# ------------------------------------------------------------------------------------------- the index
def _scan(path: Path, module: str, provider: str) -> Iterator[Card]:
    source = path.read_text(encoding="utf-8")
    if "@register(" not in source:
        return
    tree = ast.parse(source, str(path))
    for node in tree.body:
        if not isinstance(node, ast.ClassDef):
            continue
        for decorator in node.decorator_list:
            if isinstance(decorator, ast.Call) and getattr(decorator.func, "id", "") == "register":
                keywords = {k.arg: ast.literal_eval(k.value) for k in decorator.keywords if k.arg}
                doc = inspect.cleandoc(ast.get_docstring(node) or ast.get_docstring(tree) or "")
                yield Card(
                    name=ast.literal_eval(decorator.args[0]),
                    **keywords,
                    summary=doc.split("\n", 1)[0],
                    doc=doc,
                    module=module,
                    class_name=node.name,
                    provider=provider,
                )


def _own_cards() -> Iterator[Card]:
    root = Path(__file__).parent
    for package in _SCANNED_PACKAGES:
        folder = root / package
        # rglob does not descend into a symbolic link it starts from on every Python, so resolve it first
        base = folder.resolve()
        for path in sorted(base.rglob("*.py")):
            parts = path.relative_to(base).with_suffix("").parts
            if parts[-1] != "__init__":
                yield from _scan(path, ".".join(("zoo", package, *parts)), "block-zoo")


def _source_of(module: str) -> Path | None:
    """File of a module, found without importing it or its parent packages."""
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None:
        return None
    if not rest:
        return Path(spec.origin) if spec.origin else None
    for location in spec.submodule_search_locations or ():
        stem = Path(location, *rest)
        for path in (stem.with_suffix(".py"), stem / "__init__.py"):
            if path.is_file():
                return path
    return None


def _foreign_cards() -> Iterator[Card]:
    for point in importlib.metadata.entry_points(group=ENTRY_POINTS):
        provider = point.dist.name if point.dist else point.module
        try:
            path = _source_of(point.module)
            if path is None:
                raise ModuleNotFoundError(f"no module {point.module}")
            cards = {c.class_name: c for c in _scan(path, point.module, provider)}
            if point.attr not in cards:
                raise AttributeError(f"no class {point.attr} with @register in {path}")
            yield cards[point.attr]
        except Exception as error:  # a stranger's plug-in must not break anyone
            warnings.warn(f"plug-in {point.name!r} of {provider} is ignored: {error}", stacklevel=2)


@functools.cache
def _index() -> dict[str, Card]:
    index: dict[str, Card] = {}
    for card in _own_cards():
        if card.name in index:
            raise ValueError(f"two blocks are named {card.name!r}: {index[card.name].module} and {card.module}")
        index[card.name] = card
    for card in _foreign_cards():
        if card.name in index:
            warnings.warn(
                f"plug-in {card.module}:{card.class_name} is ignored: the name {card.name!r} is taken by "
                f"{index[card.name].module}",
                stacklevel=2,
            )
        else:
            index[card.name] = card
    return index


def refresh() -> None:
    """Forget the index, after installing a plug-in in a running process."""
    _index.cache_clear()
    load.cache_clear()
    options.cache_clear()


def list_blocks(kind: str | None = None) -> list[str]:
    """Names of all blocks, or of those of one kind, sorted."""
    if kind is not None and kind not in KINDS:
        raise ConfigError(f"unknown kind {kind!r}{did_you_mean(kind, KINDS)}; one of {', '.join(KINDS)}")
    return sorted(name for name, card in _index().items() if kind in (None, card.kind))


def block_card(name: str) -> Card:
    """Card of a block. ConfigError names the nearest known name."""
    try:
        return _index()[name]
    except KeyError:
        raise ConfigError(f"unknown block {name!r}{did_you_mean(name, _index())}") from None


def class_index() -> dict[str, str]:
    """Class name -> module of every block that stands in `zoo.blocks`."""
    return {c.class_name: c.module for c in _index().values() if c.module.startswith("zoo.blocks.")}


@functools.cache
def load(name: str) -> type:
    """Class of a block: its name, or `package.module:Class` or `package.module:registered_name` of a
    stranger's (only from Python and `zoo verify`, never from YAML)."""
    if ":" in name:
        module_name, wanted = name.split(":", 1)
        try:
            module = importlib.import_module(module_name)
        except ImportError as error:
            raise ConfigError(f"cannot import {module_name}: {error}") from error
        found = {c.zoo_registration.name: c for c in vars(module).values() if hasattr(c, "zoo_registration")}
        found |= {c.__name__: c for c in found.values()}
        if wanted not in found:
            raise ConfigError(f"{module_name} has no registered block {wanted!r}{did_you_mean(wanted, found)}")
        return found[wanted]
    card = block_card(name)
    try:
        return getattr(importlib.import_module(card.module), card.class_name)
    except ImportError as error:
        raise ConfigError(f"block {name!r} of {card.provider} cannot be imported: {error}") from error


def create(name: str, dim: int, **given: Any) -> Any:
    """Build a block with initialised parameters (on the meta device: shapes only).

    `given` are the block's options and, if wanted, `device` and `dtype`. A wrong option raises ConfigError.
    """
    cls = load(name)
    kind = cls.zoo_registration.kind  # type: ignore[attr-defined]
    if kind == "combinator":
        raise ConfigError(f"{name} is a combinator: it joins blocks in a configuration and has no weights of its own")
    if kind in COMPONENTS:
        raise ConfigError(f"{name} is no block: it is given to attention as {kind}: {name}")
    factory = {k: given.pop(k) for k in ("device", "dtype") if k in given}
    values, complaints = check_options(name, given)
    if complaints:
        raise ConfigError([_problem(f"{name}.{key}", text) for key, text in complaints])
    try:
        block = cls(dim, **values, **factory)
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from error
    # blocks of the contract have drawn their parameters; a stranger's plain module has not
    if str(factory.get("device", "cpu")) != "meta" and not getattr(cls, "draws_itself", False):
        block.reset_parameters()
    return block


def _problem(where: str, message: str):
    from zoo.errors import Problem

    return Problem(message, where)


def component(kind: str, value: str | Mapping[str, Any]) -> Any:
    """What an option of a block names, `quest` or {quest: {options}}, built. ValueError where it cannot be."""
    name, given = (value, None) if isinstance(value, str) else next(iter(value.items()), ("", None))
    known = list_blocks(kind)
    if name not in known or not (isinstance(value, str) or len(value) == 1):
        hint = did_you_mean(name, known)
        raise ValueError(f"{kind} is one name or {{name: options}}, got {value!r}{hint}; {one_of(known)}")
    if not isinstance(given or {}, Mapping):
        raise ValueError(f"{kind}.{name}: the options must be a mapping, got {given!r}")
    values, complaints = check_options(name, given or {})
    if complaints:
        raise ValueError("; ".join(f"{kind}.{name}.{key}: {text}" for key, text in complaints))
    return load(name)(**values)


# ------------------------------------------------------------------------------------ options and types
@dataclass(frozen=True)
class Option:
    """One keyword of a block's constructor."""

    name: str
    annotation: Any
    default: Any = inspect.Parameter.empty
    choices: tuple[Any, ...] = field(default=())

    @property
    def required(self) -> bool:
        return self.default is inspect.Parameter.empty


@functools.cache
def options(name: str) -> Mapping[str, Option]:
    """The options of a block, read from its constructor's typed signature."""
    cls = load(name)
    hints = typing.get_type_hints(cls.__init__, include_extras=True)
    found = {}
    for p in inspect.signature(cls.__init__).parameters.values():
        if p.name in _NOT_OPTIONS or (p.kind is p.POSITIONAL_OR_KEYWORD and cls.zoo_registration.kind == "combinator"):
            continue  # a combinator takes the modules it combines by position
        if p.kind is not inspect.Parameter.KEYWORD_ONLY or p.name not in hints:
            raise TypeError(f"{cls.__qualname__}: option {p.name!r} must be keyword-only and annotated")
        found[p.name] = Option(p.name, hints[p.name], p.default)
    return types.MappingProxyType(found)


def check_options(name: str, given: Mapping[str, Any]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Check options against the signature; return converted values and (option, complaint) pairs."""
    known, values, complaints = options(name), {}, []
    for key, value in given.items():
        if key not in known:
            visible = [k for k in known if k not in CONTEXT_OPTIONS]
            hint = did_you_mean(key, visible) or ("; options: " + ", ".join(visible) if visible else "; it has none")
            complaints.append((str(key), f"unknown option of {name}{hint}"))
            continue
        converted, complaint = check_type(value, known[key].annotation)
        if complaint:
            complaints.append((key, complaint))
        else:
            values[key] = converted
    complaints += [(k, f"{name} needs this option") for k, o in known.items() if o.required and k not in given]
    return values, complaints
