"""Other people's code, each library behind one adapter, imported when it is raced."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from zoo.bench.groups import complaint


class Peer(NamedTuple):
    """Somebody else's layer. `call(module, x, cache, start)` -> y, `start` being the position of x's first token;
    `cache()` makes an empty one, None where the layer has no state."""

    module: nn.Module
    call: Callable[[Any, Tensor, Any, int], Tensor]
    cache: Callable[[], Any]


def find(path: str, device: str) -> Callable | str:
    """The function "module:name", or why it cannot be used on a device."""
    module, name = path.split(":")
    try:
        loaded = importlib.import_module(module)
        if why := loaded.problem(device):
            return why
        return getattr(loaded, name)
    except Exception as error:  # a library built for another torch can raise anything
        return complaint(error)


def snapshot(value: Any) -> Any:
    """The tensors inside somebody's cache, copied, with everything that `restore` needs to put them back."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: snapshot(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(snapshot(item) for item in value)
    if hasattr(value, "__dict__") and not isinstance(value, type):
        return snapshot(vars(value))
    return value


def restore(value: Any, saved: Any) -> Any:
    """What `value` was, in place where tensors have kept their shape."""
    if isinstance(value, Tensor) and isinstance(saved, Tensor) and value.shape == saved.shape:
        return value.copy_(saved)
    if isinstance(value, dict) and isinstance(saved, dict):
        for key, item in saved.items():
            value[key] = restore(value.get(key), item)
        return value
    if isinstance(value, list) and isinstance(saved, list) and len(value) == len(saved):
        value[:] = [restore(item, before) for item, before in zip(value, saved)]
        return value
    if isinstance(saved, dict) and hasattr(value, "__dict__"):
        restore(vars(value), saved)
        return value
    return snapshot(saved)
