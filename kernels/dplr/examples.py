"""Small calls of the diagonal plus low-rank recurrence, as its rows receive them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional as F


def examples(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Name and arguments (q, k, v, a, b, log_decay, scale, initial_state, doc_ids, chunk_size) of each."""

    def case(name, T, H=2, B=1, Dk=16, Dv=16, strength=1.0, erase=1.0, state=False, docs=None):
        gen = torch.Generator().manual_seed(T + Dk)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=gen)

        q, k, v = draw(B, T, H, Dk), F.normalize(draw(B, T, H, Dk), dim=-1), draw(B, T, H, Dv)
        kappa = F.normalize(draw(B, T, H, Dk), dim=-1)
        b = erase * draw(B, T, H, Dk).sigmoid() * kappa  # with a = -kappa, as in RWKV-7
        g = strength * F.logsigmoid(draw(B, T, H, Dk))
        S = draw(B, H, Dk, Dv).to(device) if state else None
        ids = None
        if docs is not None:
            ids = torch.repeat_interleave(torch.arange(len(docs)), torch.tensor(docs)).expand(B, -1).to(device)
        return name, (*(x.to(device, dtype) for x in (q, k, v, -kappa, b)), g.to(device), 0.5, S, ids, 64)

    yield case("odd length", 65, state=True)
    yield case("two rows, no state", 33, B=2)
    yield case("odd sizes", 130, H=1, Dk=24, Dv=40, state=True)
    yield case("three heads, wide values", 19, H=3, Dk=5, Dv=70)
    # a document of one token, borders at and inside chunks and sub-chunks
    yield case("documents", 100, docs=[3, 1, 28, 32, 1, 35], state=True)
    yield case("documents at chunk borders", 130, H=1, docs=[1, 63, 64, 1, 1])
    yield case("everything is forgotten", 66, strength=60.0, state=True)
    yield case("nothing is erased", 33, erase=0.0, state=True)
    yield case("little is forgotten, much is erased", 70, strength=0.01, erase=2.0, state=True)
    yield case("one token", 1, state=True)
    yield case("two tokens, two documents", 2, docs=[1, 1], state=True)
