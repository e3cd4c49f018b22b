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
from zoo.convert.settings import Settings, refuse_quantised
from zoo.errors import ConfigError, few
from zoo.graph.loader import load_graph

__all__ = ["from_folder", "from_hf", "save_hf", "to_hf", "to_hf_model"]


def from_hf(hf_model: nn.Module, *, context: int | None = None) -> Any:
    """The same function in our blocks: a model of transformers as a `zoo.Model`, with its weights, device and dtype.

    Evaluated logits and cached generation are the original's. context: how many tokens are to be read, needed where
    the original's angles depend on it (rope_type longrope, dynamic) and refused elsewhere. ConfigError, before any
    weight is touched, names what the graph cannot represent. `model.config["origin"]` keeps the configuration it came
    from. Of a model that sees (gemma3, llava, mistral3) it is the text tower.
    """
    config: Any = getattr(hf_model, "config", None)
    if not hasattr(config, "to_dict"):
        raise ConfigError(f"{type(hf_model).__name__} is no model of transformers: it has no config")
    refuse_quantised(config.to_dict())
    tensors = hf_model.state_dict(keep_vars=True)
    some = next(hf_model.parameters())
    values, origin = config.to_dict() | {"architectures": [type(hf_model).__name__]}, {}
    if (text := hf.text_config(config)) is not config:
        tensors = {known: t for name, t in tensors.items() if (known := hf.text_name(name)) is not None}
        text.tie_word_embeddings = tensors.get("lm_head.weight") is tensors.get("model.embed_tokens.weight")
        values, origin = text.to_dict(), {"tower_of": config.model_type}
    model, rules = plan(values, dtype=some.dtype, context=context, origin=origin)
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
    context: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Any:
    """The same from a folder of the Hub on disk: config.json and safetensors, in one file or sharded.

    Weights are streamed: beside the model, only what one of its tensors is made of is in memory. dtype: that of the
    files by default. license: where README.md names none. context: see `from_hf`. progress: called with the tensors
    that are done and all of them. ConfigError names what is missing, damaged, pickled or unknown; no code of the
    folder is run.
    """
    folder = Path(folder)
    values = read_json(folder / CONFIG)
    try:
        refuse_quantised(values)
        whole = hf.configuration(values)
        config, origin = hf.text_config(whole), {"source": str(folder), "license": license or license_of(folder)}
        describe(config.to_dict(), context)  # says what has no counterpart before a file of weights is opened
        if config is whole:
            weights = Weights(folder)
        else:
            weights = Weights(folder, hf.text_name)
            config.tie_word_embeddings &= "lm_head.weight" not in weights.names  # as in transformers
            origin["tower_of"] = whole.model_type
        model, rules = plan(config.to_dict(), dtype=dtype or weights.dtype(), context=context, origin=origin)
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


def describe(config: Mapping[str, Any], context: int | None) -> tuple[Settings, dict[str, Any]]:
    """A configuration of theirs as it was read, and as one of ours. ConfigError names what has no counterpart."""
    settings = Settings(config, context)
    document = families.load(str(config.get("model_type"))).document(settings)
    settings.check_unread()
    return settings, {"name": settings.model_type, **document}


def plan(
    config: Mapping[str, Any],
    *,
    dtype: torch.dtype,
    context: int | None = None,
    origin: Mapping[str, Any] | None = None,
) -> tuple[Model, list[Rule]]:
    """The model of a configuration of theirs on the meta device, and what its tensors are in theirs. `context`: see
    `from_hf`. `origin`: more to keep beside the configuration, such as the licence."""
    settings, document = describe(config, context)
    origin = {"config": _kept(settings), **(origin or {})} | ({} if context is None else {"context": context})
    model = assemble(load_graph(document | {"origin": origin}), dtype=dtype)
    rules = list(families.load(settings.model_type).rules(settings, model))
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
    expected, rules = plan(origin["config"], dtype=torch.float32, context=origin.get("context"))
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
