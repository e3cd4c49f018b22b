"""Small calls of the long convolution, as its rows receive them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


def examples(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Name and arguments (u, k, state, doc_ids) of each."""

    def case(name, T, L, D=20, batch=2, state=False, docs=None):
        gen = torch.Generator().manual_seed(T + L)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=gen).to(device, dtype)

        ids = None
        if docs is not None:
            ids = torch.repeat_interleave(torch.tensor(docs[0]), torch.tensor(docs[1])).expand(batch, -1).to(device)
        u, k = draw(batch, T, D), draw(L, D) / L**0.5
        return name, (u, k, draw(batch, L - 1, D) if state else None, ids)

    yield case("a filter as long as the sequence", 65, 65)
    yield case("a longer filter", 63, 130)
    yield case("a shorter filter", 130, 9)
    yield case("one tap", 33, 1)
    yield case("one token", 1, 40)
    yield case("a state", 63, 40, state=True)
    yield case("a state, fewer tokens than taps", 2, 70, state=True)
    yield case("a state, one token", 1, 65, D=7, state=True)
    yield case("a state of no inputs", 10, 1, state=True)
    yield case("documents", 70, 70, docs=([3, 1, 9, 4, 0], [1, 2, 30, 1, 36]))
    yield case("documents, borders of halves", 128, 128, D=5, docs=([0, 1, 2, 3], [8, 56, 32, 32]))
    yield case("documents, a shorter filter", 67, 11, docs=([5, 2], [40, 27]))
    yield case("documents in a few tokens", 5, 20, docs=([5, 2, 7], [1, 3, 1]))
    yield case("a state before documents is not theirs", 64, 30, state=True, docs=([1, 0], [32, 32]))
    yield case("a state before one token's document is not its own", 1, 6, state=True, docs=([4], [1]))
