"""Models of other libraries as graphs of our blocks, and back: the same function, the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zoo.architectures.model import Model
from zoo.architectures.storage import assemble, unique_tensors
from zoo.convert import families
from zoo.convert.rules import Rule
from zoo.convert.settings import Settings
from zoo.errors import ConfigError
from zoo.graph.loader import load_graph

__all__ = ["from_hf", "to_hf"]


def from_hf(hf_model: nn.Module) -> Any:
    """The same function in our blocks: a model of transformers as a `zoo.Model`, with its weights, device and dtype.

    Evaluated logits and cached generation are the original's. ConfigError, before any weight is touched, names what
    the graph cannot represent. `model.config["origin"]` keeps the configuration it came from.
    """
    config = getattr(hf_model, "config", None)
    if not hasattr(config, "to_dict"):
        raise ConfigError(f"{type(hf_model).__name__} is no model of transformers: it has no config")
    tensors = hf_model.state_dict()
    some = next(hf_model.parameters())
    values = config.to_dict() | {"architectures": [type(hf_model).__name__]}  # type: ignore[union-attr]
    model, rules = plan(values, dtype=some.dtype)
    fill(model, rules, tensors.__getitem__, some.device)
    return model


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
    neutral = ("transformers_version", "_name_or_path", "dtype")
    return {k: v for k, v in settings.as_dict().items() if v is not None and k not in neutral}


@torch.no_grad()
def fill(model: Model, rules: Iterable[Rule], read: Callable[[str], Tensor], device: Any = "cpu") -> None:
    """Allocate a model that is on the meta device, and give it theirs. `read` returns a tensor of theirs by name; no
    more than those of one rule are held. ConfigError names tensors that are missing or have another shape."""
    model.to_empty(device=device)
    model.init_weights()  # buffers that hold constants
    own = unique_tensors(model)
    for rule in rules:
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
    model.eval()


def to_hf(model: Model) -> dict[str, Tensor]:
    """The state dict of the original library, bit for bit what `from_hf` read. ConfigError where the graph is no
    longer that of its origin."""
    origin = model.config.get("origin")
    if not origin:
        raise ConfigError("the model did not come from another library (its configuration has no origin)")
    expected, rules = plan(origin["config"], dtype=torch.float32)
    for key in expected.config.keys() | model.config.keys():
        if key not in ("name", "origin", "train", "data") and expected.config.get(key) != model.config.get(key):
            raise ConfigError(f"the model is no longer a {origin['config']['model_type']}: its {key} was changed")
    own = unique_tensors(model)
    made: dict[str, Tensor] = {}
    for rule in rules:
        made |= zip(rule.theirs, rule.back([own[n] for n in rule.ours]), strict=True)
    return made
