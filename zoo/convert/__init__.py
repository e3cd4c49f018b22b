"""Models of other libraries as graphs of our blocks, and back: the same function, the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo.architectures.model import Model
from zoo.architectures.storage import allocate, assemble, unique_tensors
from zoo.convert import families, hf
from zoo.convert.folder import CONFIG, Weights, license_of, read_json, refused
from zoo.convert.rules import Rule
from zoo.convert.settings import Settings
from zoo.errors import ConfigError, few
from zoo.graph.loader import load_graph

__all__ = ["from_folder", "from_hf", "save_hf", "to_hf", "to_hf_model"]


def from_hf(hf_model: nn.Module) -> Any:
    """The same function in our blocks: a model of transformers as a `zoo.Model`, with its weights, device and dtype.

    Evaluated logits and cached generation are the original's. ConfigError, before any weight is touched, names what
    the graph cannot represent. `model.config["origin"]` keeps the configuration it came from.
    """
    config = getattr(hf_model, "config", None)
    if not hasattr(config, "to_dict"):
        raise ConfigError(f"{type(hf_model).__name__} is no model of transformers: it has no config")
    tensors = hf_model.state_dict(keep_vars=True)
    some = next(hf_model.parameters())
    values = config.to_dict() | {"architectures": [type(hf_model).__name__]}  # type: ignore[union-attr]
    model, rules = plan(values, dtype=some.dtype)
    used = {id(tensors[name]) for rule in rules for name in rule.theirs if name in tensors}
    if left := [name for name, tensor in tensors.items() if id(tensor) not in used]:
        raise ConfigError(f"{type(hf_model).__name__} has weights that the graph has no place for: {few(left)}")
    fill(model, rules, lambda name: tensors[name].detach(), some.device)
    return model


def from_folder(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: Any = "cpu",
    license: str = "",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Any:
    """The same from a folder of the Hub on disk: config.json and safetensors, in one file or sharded.

    Weights are streamed: beside the model, only what one of its tensors is made of is in memory. dtype: that of the
    files by default. license: where README.md names none. progress: called with the tensors that are done and all of
    them. ConfigError names what is missing, damaged, pickled or unknown; no code of the folder is run.
    """
    folder = Path(folder)
    values = read_json(folder / CONFIG)
    try:
        config = hf.configuration(values)
        weights = Weights(folder)
        origin = {"source": str(folder), "license": license or license_of(folder)}
        model, rules = plan(config.to_dict(), dtype=dtype or weights.dtype(), origin=origin)
        names = hf.Names(config, weights.names)
        _check(folder, names, weights, [name for rule in rules for name in rule.theirs])
        fill(model, rules, lambda name: names.make(name, weights), device, progress)
    except ConfigError as error:
        raise ConfigError([replace(p, file=p.file or str(folder)) for p in error.problems]) from None
    return model


def _check(folder: Path, names: hf.Names, weights: Weights, wanted: list[str]) -> None:
    """Refuse a checkpoint that is not that of its configuration, before any of it is read."""
    if missing := [name for name in wanted if name not in names.known]:
        raise refused(folder, f"the weights lack {few(missing)}")
    twins = {twin for name in wanted for twin in names.twins.get(name, ())}
    if surplus := names.surplus() + sorted(names.known - set(wanted) - twins):
        raise refused(folder, f"the weights hold what the model has no place for: {few(surplus)}")
    for name in wanted:
        shape = tuple(names.make(name, lambda part: torch.empty(weights.shape(part), device="meta")).shape)
        if shape != names.shapes[name]:
            raise refused(folder, f"{name} is {list(shape)}; the configuration says {list(names.shapes[name])}")
    for name in wanted:
        for twin in names.twins.get(name, set()) & names.known:
            if not torch.equal(names.make(name, weights), names.make(twin, weights)):
                raise refused(folder, f"{name} and {twin} differ; the configuration says they are one")


def plan(
    config: Mapping[str, Any], *, dtype: torch.dtype, origin: Mapping[str, Any] | None = None
) -> tuple[Model, list[Rule]]:
    """The model of a configuration of theirs on the meta device, and what its tensors are in theirs. `origin`: more
    to keep beside the configuration, such as the licence."""
    settings = Settings(config)
    family = families.load(str(config.get("model_type")))
    document = family.document(settings)
    settings.check_unread()
    document = {"name": settings.model_type, **document, "origin": {"config": _kept(settings), **(origin or {})}}
    model = assemble(load_graph(document), dtype=dtype)
    rules = list(family.rules(settings, model))
    names = [n for rule in rules for n in rule.ours]
    own = unique_tensors(model).keys()
    if len(names) != len(set(names)) or own != set(names):
        odd = sorted(own ^ set(names)) or sorted(n for n in names if names.count(n) > 1)
        raise RuntimeError(f"the mapping of {settings.model_type} is wrong at {', '.join(odd[:4])}")
    return model, rules


def _kept(settings: Settings) -> dict[str, Any]:
    # null stays: it may not be the default
    return {k: v for k, v in settings.as_dict().items() if k not in ("transformers_version", "_name_or_path", "dtype")}


@torch.no_grad()
def fill(
    model: Model,
    rules: Iterable[Rule],
    read: Callable[[str], Tensor],
    device: Any = "cpu",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Allocate a model that is on the meta device, and give it theirs. `read` returns a tensor of theirs by name; no
    more than those of one rule are held. ConfigError names tensors that are missing or have another shape."""
    allocate(model, device)
    own, rules = unique_tensors(model), list(rules)
    for done, rule in enumerate(rules):
        progress(done, len(rules))
        _apply(rule, own, read)
    progress(len(rules), len(rules))
    model.eval()


def _apply(rule: Rule, own: Mapping[str, Tensor], read: Callable[[str], Tensor]) -> None:
    try:
        given = [read(name) for name in rule.theirs]
    except KeyError as error:
        raise ConfigError(f"the weights lack {error.args[0]}") from None
    for name, tensor in zip(rule.ours, rule.there(given), strict=True):
        if tensor.shape != own[name].shape:
            raise ConfigError(
                f"{', '.join(rule.theirs)}: {tuple(tensor.shape)} does not fit {name}, {tuple(own[name].shape)}"
            )
        own[name].copy_(tensor)


def to_hf(model: Model) -> dict[str, Tensor]:
    """The state dict of the original library, bit for bit what `from_hf` read. ConfigError where the graph is no
    longer that of its origin."""
    origin = model.config.get("origin")
    if not (origin and origin.get("config")):
        raise ConfigError("the model did not come from another library (its configuration has no origin)")
    expected, rules = plan(origin["config"], dtype=torch.float32)
    other = {"name", "description", "origin", "train", "data", "parallel"}  # say nothing of the function
    for key in (expected.config.keys() | model.config.keys()) - other:
        if expected.config.get(key) != model.config.get(key):
            raise ConfigError(f"the model is no longer a {origin['config']['model_type']}: its {key} was changed")
    own = unique_tensors(model)
    made: dict[str, Tensor] = {}
    for rule in rules:
        made |= zip(rule.theirs, rule.back([own[n] for n in rule.ours]), strict=True)
    return made


def to_hf_model(model: Model) -> nn.Module:
    """The model of transformers that `to_hf` gives the weights of."""
    tensors = to_hf(model)
    some = next(model.parameters())
    return hf.filled(hf.configuration(model.config["origin"]["config"]), tensors, some.dtype).to(some.device)


def save_hf(model: Model, folder: str | Path) -> Path:
    """Write config.json and safetensors that transformers loads with the original's class, and the licence."""
    folder, theirs = Path(folder), to_hf_model(model)
    theirs.save_pretrained(folder)  # type: ignore[operator]
    if license := model.config["origin"].get("license"):
        (folder / "README.md").write_text(f"---\nlicense: {license}\n---\n", encoding="utf-8")
    return folder
