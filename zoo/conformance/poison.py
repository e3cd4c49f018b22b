"""Fresh memory that is NaN instead of accidentally zero, so that a read before the first write shows."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch

_PLACES = [(torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty")]


def _poisoning(make: Callable) -> Callable:
    @functools.wraps(make)
    def made(*args, **kwargs):
        out = make(*args, **kwargs)
        # fake and functional tensors of the compiler have no memory to fill
        if type(out) is torch.Tensor and out.is_floating_point() and not out.is_meta:
            out.detach().fill_(float("nan"))
        return out

    made.poisons = True  # type: ignore[attr-defined]
    return made


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Inside, torch.empty and its relatives return NaN (float dtypes). Nesting changes nothing."""
    if hasattr(torch.empty, "poisons"):
        yield
        return
    with torch.device("cpu"):
        torch.empty(0)  # torch.device learns the constructors at its first use: not from ours, which it would pass over
    before = [getattr(owner, name) for owner, name in _PLACES]
    for (owner, name), make in zip(_PLACES, before, strict=True):
        setattr(owner, name, _poisoning(make))
    try:
        yield
    finally:
        for (owner, name), make in zip(_PLACES, before, strict=True):
            setattr(owner, name, make)
