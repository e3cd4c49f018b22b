"""Small calls of the diagonal scan, as its rows receive them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


def examples(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Name and arguments (log_decay, inputs, initial_state, doc_ids) of each."""

    def case(name, T, shape=(24,), batch=2, strength=1.0, state=False, docs=None, spread=None):
        gen = torch.Generator().manual_seed(T)
        x = torch.randn(batch, T, *shape, generator=gen).to(device, dtype)
        g = -strength * torch.rand((batch, T, *shape) if spread is None else spread, generator=gen)
        h = torch.randn(batch, *shape, generator=gen).to(device) if state else None
        ids = None
        if docs is not None:
            ids = torch.repeat_interleave(torch.arange(len(docs)), torch.tensor(docs)).expand(batch, -1).to(device)
        return name, (g.to(device), x, h, ids)

    yield case("plain", 65)
    yield case("state, several dimensions", 37, shape=(3, 7), state=True)
    yield case("one decay for all tokens", 40, spread=(24,), state=True)
    yield case("documents", 70, docs=[1, 15, 16, 1, 31, 6], state=True)
    yield case("everything is forgotten", 33, strength=60.0, state=True)
    yield case("no decay", 20, strength=0.0)
    yield case("one token", 1, state=True)
