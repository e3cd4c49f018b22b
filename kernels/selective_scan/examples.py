"""Small calls of the selective scan, as its rows receive them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional as F


def examples(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Name and arguments (u, delta, A, B, C, initial_state, doc_ids, chunk_size) of each."""

    def case(name, T, E=16, N=8, batch=1, strength=1.0, state=False, docs=None):
        gen = torch.Generator().manual_seed(T + E)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=gen)

        u, B, C = (x.to(device, dtype) for x in (draw(batch, T, E), draw(batch, T, N), draw(batch, T, N)))
        delta = F.softplus(draw(batch, T, E)).to(device, dtype)
        A = (-strength * (1 + draw(E, N).abs())).to(device)
        h = draw(batch, E, N).to(device) if state else None
        ids = None
        if docs is not None:
            ids = torch.repeat_interleave(torch.arange(len(docs)), torch.tensor(docs)).expand(batch, -1).to(device)
        return name, (u, delta, A, B, C, h, ids, 16)

    yield case("plain", 65, batch=2)
    yield case("state, odd sizes", 37, E=21, N=5, state=True)
    yield case("documents", 70, docs=[1, 15, 16, 1, 31, 6], state=True)
    yield case("everything is forgotten", 33, strength=60.0, state=True)
    yield case("no decay", 20, strength=0.0, state=True)
    yield case("one token", 1, state=True)
    yield case("two tokens, one channel", 2, E=1, N=1)
    yield case("time in chunks", 150, N=4, docs=[47, 2, 60, 41], state=True)
    yield case("time in chunks, no decay", 130, N=2, strength=0.0)
