"""The one door to transformers: its configurations, its models without weights, and the names weights have on disk."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zoo.convert import families
from zoo.errors import ConfigError

Read = Callable[[str], Tensor]
# each of these is a Python object, before any weight is looked at
_COUNTED, _MOST = re.compile("layers?$|labels$|experts$|blocks$"), 100_000
# on disk, computed anew by every model
COMPUTED = re.compile(r"rotary_emb\.inv_freq$")
# models that see, whose text tower is a causal model of a family of its own
TOWERS = ("gemma3", "llava", "mistral3")
SIGHT = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\.")


def configuration(values: Mapping[str, Any]) -> Any:
    """The configuration of the values of a config.json: names of older versions understood, defaults filled in.

    No code but that of transformers takes part, whatever `auto_map` says. ConfigError where the family is unknown.
    """
    if not (kind := str(values.get("model_type") or "")):
        raise ConfigError("the configuration names no model_type")
    foreign = () if kind in TOWERS else getattr(families.load(kind), "FOREIGN", ())  # says which families there are
    text = values.get("text_config")
    for name, value in (*values.items(), *(text.items() if isinstance(text, Mapping) else ())):
        if _COUNTED.search(name) and isinstance(value, int) and value > _MOST:
            raise ConfigError(f"{name}: {value} is more than any model has")
    # names of kernels, which transformers would fetch and run
    values = {name: value for name, value in values.items() if "_implementation" not in name}
    try:
        from transformers import CONFIG_MAPPING
    except ImportError:
        raise ConfigError("models of transformers are read by its help: pip install 'block-zoo[hf]'") from None
    try:
        kind_of = CONFIG_MAPPING[kind]
        known = {name: value for name, value in values.items() if name not in foreign}
        return kind_of.from_dict(kind_of._decode_special_floats(known))  # infinity is no JSON
    except Exception as error:  # whatever the checks of the library raise, the file is at fault
        raise ConfigError(f"the configuration is not one of {kind}: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def text_config(config: Any) -> Any:
    """The configuration of the text tower of a model that sees, of another model its own."""
    if getattr(config, "model_type", None) not in TOWERS:
        return config
    text = copy.deepcopy(config.text_config)
    text.tie_word_embeddings = config.tie_word_embeddings
    text.architectures = [class_of(text).__name__]
    return text


def text_name(name: str) -> str | None:
    """What the text tower calls a weight of a model that sees, None where it has none of it. On disk the tower is a
    causal model beside the others, in memory the head is outside of it."""
    if SIGHT.match(name):
        return None
    inside = name.removeprefix("model.language_model.")
    return name.removeprefix("language_model.") if inside == name else f"model.{inside}"


def class_of(config: Any) -> type:
    """The class of the model, by name among those of transformers."""
    import transformers

    names = getattr(config, "architectures", None) or []
    if not names:
        found = transformers.AutoModelForCausalLM._model_mapping.get(type(config), None)  # type: ignore[attr-defined]
    else:
        found = getattr(transformers, str(names[0]), None)
    is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    if not is_model or found.config_class is not type(config):  # type: ignore[union-attr]
        raise ConfigError(f"architectures: {names} names no model of type {config.model_type!r} in transformers")
    return found  # type: ignore[return-value]


def filled(config: Any, tensors: dict[str, Tensor], dtype: torch.dtype) -> Any:
    """Their model with these weights."""
    config.dtype = dtype
    cls: Any = class_of(config)
    return cls.from_pretrained(None, config=config, state_dict=tensors, dtype=dtype).eval()


class Names:
    """How the weights of a model of theirs are made of those on disk, which may have other names or be in parts.

    `unknown` are those on disk that belong to no weight of the model; `shapes` and `twins` (other names of the same
    weight) are those of the model.
    """

    def __init__(self, config: Any, on_disk: Iterable[str]):
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

        kind = class_of(config)
        try:
            with torch.device("meta"):
                self._model: Any = kind(config)
        except Exception as error:  # whatever its layers raise, the file is at fault
            raise ConfigError(f"the configuration builds no {kind.__name__}: {_first_line(error)}") from None
        weights = self._model.state_dict(keep_vars=True)
        self.shapes = {name: tuple(t.shape) for name, t in weights.items()}
        by_id: dict[int, list[str]] = {}
        for name, tensor in weights.items():
            by_id.setdefault(id(tensor), []).append(name)
        self.twins = {name: set(by_id[id(t)]) - {name} for name, t in weights.items()}
        transforms = get_model_conversion_mapping(self._model)
        renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        converters = [t for t in transforms if isinstance(t, WeightConverter)]
        by_pattern = {pattern: t for t in converters for pattern in t.source_patterns}
        self._parts: dict[str, list[tuple[str, str | None]]] = {}  # of the first weight made of them
        self._converters: dict[str, Any] = {}
        self._first: dict[str, str] = {}
        self.unknown: list[str] = []
        prefix = self._model.base_model_prefix
        for source in sorted(on_disk, key=dot_natural_key):
            name, pattern = rename_source_key(source, renamings, converters, prefix, weights)
            if name not in weights and source in weights:
                name, pattern = source, None
            if name not in weights:
                self.unknown.append(source)
                continue
            self._parts.setdefault(name, []).append((source, pattern))
            self._first[name] = name
            if pattern is not None:
                self._converters[name] = by_pattern[pattern]
                first, *others = by_pattern[pattern].target_patterns
                self._first |= {name.replace(first, other): name for other in others}

        for name, twins in self.twins.items():
            if name not in self._first and (there := sorted(twins & self._first.keys())):
                self._first[name] = there[0]

    @property
    def known(self) -> set[str]:
        """The weights of the model that can be made."""
        return set(self._first)

    def surplus(self) -> list[str]:
        """Names on disk that mean something, but to another model."""
        ignored = [COMPUTED, *map(re.compile, self._model._keys_to_ignore_on_load_unexpected or ())]
        config = self._model.config
        if further := getattr(config, "num_nextn_predict_layers", 0):  # of heads for further tokens
            last = config.num_hidden_layers
            ignored += [re.compile(rf"^model\.layers\.{n}\.") for n in range(last, last + further)]
        return [name for name in self.unknown if not any(pattern.search(name) for pattern in ignored)]

    def make(self, name: str, read: Read) -> Tensor:
        """A weight of the model. KeyError where it is not on disk."""
        first = self._first[name]
        parts = self._parts[first]
        if first not in self._converters:
            return read(parts[0][0])
        converter = copy.deepcopy(self._converters[first])
        for source, pattern in parts:
            converter.add_tensor(first, source, pattern, partial(read, source))
        made = converter.convert(first, model=self._model, config=self._model.config)[name]
        return made[0] if isinstance(made, list) else made
