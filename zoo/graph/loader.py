"""Configurations: found, read, merged with overrides, resolved, checked."""

from __future__ import annotations

import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import omegaconf
from omegaconf import DictConfig, OmegaConf

from zoo import registry
from zoo.errors import ConfigError, Problem, did_you_mean, one_of
from zoo.graph.document import graph_of
from zoo.graph.parse import Parser
from zoo.graph.reading import MAX_VALUES, Source, read_file, read_text, scalar
from zoo.graph.spec import Graph
from zoo.schema import PositiveFloat, PositiveInt, check_type
from zoo.sections import (
    DataSection,
    DiffusionSection,
    DistillSection,
    OriginSection,
    ParallelSection,
    TrainSection,
    VisionSection,
)

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
# the keys that only one architecture has; it needs the first of them
KEYS_OF = {
    "causal_lm": ("vocab_size", "tie_embeddings", "embedding_scale", "logit_scale", "logit_cap", "diffusion", "prefix"),
    "vision": ("vision", "distill"),
}
_MOST_NUMBERS = 2**60  # of a tensor: bytes are counted in 64 bits
_INTERPOLATION = re.compile(r"\$\{([^${}]*)\}")


@dataclass(frozen=True)
class TopLevel:
    """The keys of a configuration."""

    dim: PositiveInt
    trunk: Any
    name: str = "model"
    description: str = ""
    architecture: Literal["causal_lm", "vision"] = "causal_lm"
    vocab_size: PositiveInt = 1
    vision: VisionSection | None = None
    define: Any = None
    norm: Any = "rms"
    final_norm: Any = "rms"
    residual: Any = "pre"
    tie_embeddings: bool = True
    embedding_scale: PositiveFloat = 1.0
    logit_scale: PositiveFloat = 1.0
    logit_cap: PositiveFloat | None = None
    diffusion: DiffusionSection | None = None
    prefix: PositiveInt | None = None
    train: TrainSection | None = None
    data: DataSection | None = None
    parallel: ParallelSection | None = None
    distill: DistillSection | None = None
    origin: OriginSection | None = None


def config_names() -> list[str]:
    """Names of the configurations that come with the zoo."""
    return sorted(p.stem for p in CONFIGS.glob("*.yaml"))


def find_config(name: str | Path) -> Path:
    """A file, a run or model folder with a config.yaml, or a shipped configuration by its name."""
    path = Path(name)
    if path.is_dir() and (path / "config.yaml").is_file():
        return path / "config.yaml"
    if path.is_file():
        return path
    if path.suffix in (".yaml", ".yml") and not path.exists() and len(path.parts) > 1 and path.parts[0] != "configs":
        raise ConfigError([Problem("there is no such file", file=str(path))])
    stem = path.stem if path.suffix in (".yaml", ".yml") else path.name  # a name may hold a dot: huginn_3.5b
    shipped = CONFIGS / f"{stem}.yaml"
    if shipped.is_file() and len(path.parts) <= 2:
        return shipped
    hint = did_you_mean(stem, config_names())
    raise ConfigError([Problem(f"there is no such file or shipped configuration{hint}", file=str(path))])


def load_graph(config: str | Path | Mapping | DictConfig, overrides: Iterable[str] = ()) -> Graph:
    """Read and check a configuration. ConfigError lists every problem with file, line and column.

    config: a path, a shipped name, or a mapping. overrides: `key=value`, with paths such as
    `trunk[0].repeat=2` and values in YAML. Blocks are tried on the meta device, so wrong combinations of
    options are found too; no memory is allocated for parameters.
    """
    source = _source(config)
    if not isinstance(source.value, Mapping):
        raise ConfigError([source.problem((), "the document must be a mapping with dim, vocab_size and trunk")])
    document = _resolve(_override(source, overrides), source)
    return parse(document, source)


def load_config(path_or_name: str | Path | Mapping | DictConfig, overrides: Iterable[str] = ()) -> DictConfig:
    """The configuration merged with overrides, resolved and checked. See `load_graph`."""
    return OmegaConf.create(dict(load_graph(path_or_name, overrides).document))


def parse(document: Mapping[str, Any], source: Source) -> Graph:
    """A resolved document -> Graph."""
    parser = Parser(source)
    hints = typing.get_type_hints(TopLevel, include_extras=True)
    known = {f.name: f for f in fields(TopLevel)}
    top: dict[str, Any] = {}
    for key, value in document.items():
        if key not in known:
            hint = did_you_mean(key, known) or f"; {one_of(known)}"
            parser.complain((key,), f"unknown key{hint}")
            continue
        section = _section_in(hints[key])
        if section and value is not None:
            _check_section(parser, section, value, (key,))
            top[key] = value
            continue
        top[key], why = check_type(value, hints[key])
        if why:
            parser.complain((key,), why)
            del top[key]
    architecture = top.get("architecture", "causal_lm")
    for name, field in known.items():
        needed = field.default is MISSING or name == KEYS_OF[architecture][0]
        if needed and name not in document:
            parser.complain((), f"the key {name} is missing")
    for other, keys in KEYS_OF.items():
        for key in keys if other != architecture else ():
            if key in document:
                parser.complain((key,), f"goes with architecture: {other}, this is {architecture}")
    if top.get("prefix") and top.get("diffusion") is not None:
        parser.complain(("prefix",), "a block diffuser has no prefix: it shows every block to itself")
    graph = graph_of(parser, top, document)
    if not parser.problems:
        _try_blocks(graph, parser)
    if parser.problems:
        # in the order of the file; what came from overrides last
        order = sorted(parser.problems.values(), key=lambda p: (p.line is None, p.line or 0, p.column or 0))
        raise ConfigError(order)
    return graph


def _section_in(hint: Any) -> type | None:
    """The dataclass that an annotation names, alone or with None."""
    return next((a for a in (hint, *typing.get_args(hint)) if isinstance(a, type) and is_dataclass(a)), None)


def _check_section(parser: Parser, section: type, value: Any, path: tuple) -> None:
    """Check a nested dataclass schema; sections inside sections are mappings of their own, or lists of them."""
    if not isinstance(value, Mapping):
        parser.complain(path, f"must be a mapping, got {value!r}")
        return
    hints = typing.get_type_hints(section, include_extras=True)
    inner = {k: _section_in(h) for k, h in hints.items()}
    wrong = set()
    for key, item in value.items():
        before = len(parser.problems)
        if (inside := inner.get(key)) and isinstance(item, Mapping):
            _check_section(parser, inside, item, (*path, key))
        elif inside and isinstance(item, list):
            for i, one in enumerate(item):
                _check_section(parser, inside, one, (*path, key, i))
        if len(parser.problems) > before:
            wrong.add(key)
    before = len(parser.problems)
    plain = {k: v for k, v in value.items() if k not in wrong and not (inner.get(k) and isinstance(v, Mapping))}
    values = parser.section(section, plain, path)
    if not wrong and len(parser.problems) == before and hasattr(section, "complaints"):
        for key, why in section(**values).complaints():
            parser.complain((*path, key), why)


def _try_blocks(graph: Graph, parser: Parser) -> None:
    """Build every distinct block and router once on the meta device: finds combinations of options that do not
    go together, and nodes that look ahead where the architecture must not."""
    if graph.vocab_size * graph.dim > _MOST_NUMBERS:
        parser.complain(
            ("vocab_size",), f"{graph.vocab_size} embeddings of {graph.dim} numbers are more than any memory holds"
        )
    tried: set[str] = set()
    # what gets some of the tokens, or chunks of them, cannot know a prefix of the row by its first ones
    gathering = (n for n in graph.walk() if n.router is not None and n.router.name != "fixed")
    gathered = {id(spec) for node in gathering for child in node.children for spec in child.walk()}
    for spec, dim in (pair for item in graph.trunk for pair in item.widths(graph.dim)):
        parts = [(spec.norm, {}, 1), (None if spec.kind in ("combinator", "skip") else spec, {}, 1)]
        steps = spec.options.get("steps", len(spec.children))
        parts.append((spec.router, {"steps": steps, "nested": spec.name == "loop"}, 1))
        if spec.kind == "combinator":
            combinator = registry.load(spec.name)
            parts += [(part, {}, width) for part, width in combinator.own_blocks(spec)]
            # a loop with a ring of states runs token by token
            if graph.diffuses and (not combinator.sees_blocks or spec.options.get("ring")):
                parser.complain(spec.path, f"{spec.name} goes by the order of tokens, block diffusion in any order")
        for part, context, width in parts:
            if part is None:
                continue
            key = repr((part.name, dim, sorted(part.options.items(), key=str), sorted(context.items()), part.path))
            if key in tried:
                continue
            tried.add(key)
            _try(part, context, width * dim, graph, parser, 0 if id(part) in gathered else graph.prefix)


def _try(spec, context: dict, dim: int, graph: Graph, parser: Parser, prefix: int) -> None:
    known = registry.options(spec.name)
    values = {**spec.options, **{k: v for k, v in context.items() if k in known}}
    if "num_layers" in known:
        values["num_layers"] = graph.num_layers
    try:
        block = registry.load(spec.name)(dim, **values, device="meta")
    except ValueError as error:
        parser.complain(spec.path, f"{spec.name}: {error}")
        return
    except (RuntimeError, MemoryError, OverflowError, TypeError) as error:
        if isinstance(error, TypeError) and "verflow" not in str(error):  # torch's word for an int64 that is too large
            raise
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        parser.complain(spec.path, f"{spec.name} cannot be built with these sizes: {first}")
        return
    ahead = getattr(block, "prefix_len", None)  # how far it looks ahead, if it says so
    if graph.architecture == "causal_lm" and not getattr(block, "causal", True) and not (ahead and ahead <= prefix):
        note = registry.block_card(spec.name).note
        hint = f"; the first {ahead} may, with `prefix: {ahead}` at the top and no router above" if ahead else ""
        parser.complain(
            spec.path,
            f"{spec.name} with these options looks at later tokens and {graph.architecture} is causal{hint}"
            + (f" ({note})" if note else ""),
        )
    elif graph.diffuses and spec.kind == "router" and spec.name != "fixed":
        parser.complain(spec.path, f"{spec.name} chooses among tokens; block diffusion needs all of a block everywhere")
    elif graph.diffuses and not getattr(block, "sees_blocks", True):
        parser.complain(
            spec.path,
            f"{spec.name} with these options cannot show a token the later ones of its block, as block diffusion must; "
            "attention to everything before and mla can, and so can blocks that treat each token alone",
        )


# -------------------------------------------------------------------------------- reading and merging
def _source(config: str | Path | Mapping | DictConfig) -> Source:
    if isinstance(config, DictConfig):
        config = OmegaConf.to_container(config)  # type: ignore[assignment]
    if isinstance(config, Mapping):
        return Source("", dict(config))
    return read_file(find_config(config))


def _override(source: Source, overrides: Iterable[str]) -> DictConfig:
    try:
        config = OmegaConf.create(source.value)
    except (omegaconf.errors.OmegaConfBaseException, ValueError, TypeError) as error:
        raise ConfigError([_omegaconf_problem(source, error)]) from None
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"override {text!r}: write key=value")
        parsed = scalar(value) if not value.lstrip().startswith(("[", "{", '"', "'")) else read_text(value).value
        try:
            OmegaConf.update(config, key.strip(), parsed, merge=True, force_add=True)
        except Exception as error:  # OmegaConf raises many kinds for a path that does not exist
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ConfigError(f"override {text!r}: there is no place {key.strip()!r} ({first})") from None
        source.overridden[_key_path(key.strip())] = text
    return config


def _key_path(key: str) -> tuple:
    parts = re.findall(r"[^.\[\]]+", key)
    return tuple(int(p) if re.fullmatch(r"-?\d{1,9}", p) else p for p in parts)


def _resolve(config: DictConfig, source: Source) -> dict[str, Any]:
    plain = OmegaConf.to_container(config)
    _check_interpolations(plain, source)
    try:
        return OmegaConf.to_container(config, resolve=True)  # type: ignore[return-value]
    except (omegaconf.errors.OmegaConfBaseException, RecursionError, ValueError) as error:
        raise ConfigError([_omegaconf_problem(source, error)]) from None


def _omegaconf_problem(source: Source, error: Exception) -> Problem:
    if isinstance(error, RecursionError):
        return source.problem((), "the interpolations refer to each other in a circle")
    key = getattr(error, "full_key", None)
    message = str(error).splitlines()[0] if str(error) else type(error).__name__
    return source.problem(_key_path(key) if isinstance(key, str) else (), message)


def _check_interpolations(plain: Any, source: Source) -> None:
    """Refuse resolvers (`${oc.env:HOME}`), circles, and interpolations that would expand without bound."""
    sizes: dict[tuple, int] = {}

    def lookup(path: tuple) -> Any:
        value = plain
        for part in path:
            value = value[part]
        return value

    def size(value: Any, path: tuple, active: tuple) -> int:
        if isinstance(value, Mapping):
            return 1 + sum(size(v, (*path, k), active) for k, v in value.items())
        if isinstance(value, list):
            return 1 + sum(size(v, (*path, i), active) for i, v in enumerate(value))
        if not isinstance(value, str) or "${" not in value:
            return 1 + (len(value) // 64 if isinstance(value, str) else 0)
        if path in sizes:
            return sizes[path]
        if path in active:
            raise ConfigError([source.problem(path, "the interpolations refer to each other in a circle")])
        if len(active) > 64:
            raise ConfigError([source.problem(path, "interpolations are chained more than 64 deep")])
        total = 1
        for inside in _INTERPOLATION.findall(value):
            if ":" in inside:
                raise ConfigError([source.problem(path, f"resolvers such as ${{{inside}}} are not allowed")])
            target = _target(inside.strip(), path)
            try:
                found = lookup(target)
            except (KeyError, IndexError, TypeError):
                raise ConfigError([source.problem(path, f"${{{inside}}} refers to nothing")]) from None
            if path[: len(target)] == target:
                raise ConfigError([source.problem(path, f"${{{inside}}} contains itself")])
            total += size(found, target, (*active, path))
        if "${" in _INTERPOLATION.sub("", value):
            raise ConfigError([source.problem(path, "nested or unclosed interpolations are not allowed")])
        if total > MAX_VALUES:
            raise ConfigError([source.problem(path, f"the interpolations expand to more than {MAX_VALUES:,} values")])
        sizes[path] = total
        return total

    if size(plain, (), ()) > MAX_VALUES:
        raise ConfigError([source.problem((), f"the interpolations expand to more than {MAX_VALUES:,} values")])


def _target(text: str, path: Sequence[Any]) -> tuple:
    dots = len(text) - len(text.lstrip("."))
    # one dot: beside this value; each further dot: one level up
    base = tuple(path[:-dots]) if dots else ()
    return base + _key_path(text[dots:])
