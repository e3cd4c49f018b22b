"""One file for each family of models, named as transformers names its `model_type`.

A file has `document(s) -> dict`, the configuration of the zoo for the `Settings` s, and `rules(s, model) ->
Iterator[Rule]`, what each tensor of the model (on the meta device) is in theirs.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from zoo.errors import ConfigError, did_you_mean, one_of


def names() -> list[str]:
    """The families that can be converted."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def load(model_type: str) -> ModuleType:
    """The mapping of a family. ConfigError where there is none."""
    if model_type not in names():
        hint = did_you_mean(model_type, names()) or f"; can be {one_of(names())}"
        raise ConfigError(f"models of type {model_type!r} cannot be converted{hint}")
    return importlib.import_module(f"{__name__}.{model_type}")
