"""Small calls of pLSTM, as its rows receive them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


def examples(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Name and arguments (q, k, v, source, transition, mark, direct, scale, initial_state, doc_ids, chunk_size) of
    each."""

    def case(name, T, J, V=None, R=None, H=2, B=1, Dk=6, Dv=5, state=False, docs=None, chunk=8):
        gen = torch.Generator().manual_seed(T + J)
        V, R = V or J, R or J

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(B, *shape, generator=gen)

        q, k, v = draw(T, H, Dk), draw(T, H, Dk), draw(T, H, V, Dv)
        source, mark, direct = draw(T, H, J, V).sigmoid(), draw(T, H, R, J).sigmoid(), draw(T, H, R, V).sigmoid()
        transition = draw(T, H, J, J)
        # norms below 1 and, for the gradient of |T| with one slot, away from 0
        transition = transition / (transition.abs().sum((-2, -1), keepdim=True) + 0.2)
        C = draw(H, J, Dk, Dv).to(device) if state else None
        ids = None
        if docs is not None:
            ids = torch.repeat_interleave(torch.arange(len(docs)), torch.tensor(docs)).expand(B, -1).to(device)
        given = (x.to(device, dtype) for x in (q, k, v, source, transition, mark, direct))
        return name, (*given, 0.5, C, ids, chunk)

    yield case("one slot", 70, 1, B=2)
    yield case("one slot, state", 37, 1, state=True)
    yield case("one slot, documents", 40, 1, docs=[1, 20, 1, 18], state=True)
    yield case("one slot, one token", 1, 1, state=True)
    yield case("two slots", 37, 2, B=2, state=True)
    yield case("three slots, two values, one output", 21, 3, V=2, R=1, state=True)
    yield case("one slot, two values", 19, 1, V=2, R=2)
    yield case("documents", 40, 2, docs=[3, 1, 20, 16], state=True)
    yield case("one token", 1, 2, state=True)
    yield case("two tokens", 2, 2)
