"""Small calls of the delta rule, as its rows receive them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional as F


def examples(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Name and arguments (q, k, v, beta, log_decay, scale, initial_state, doc_ids, chunk_size) of each."""

    def case(name, kind, T, G=2, H=2, B=1, Dk=16, Dv=16, strength=1.0, state=False, docs=None, most=1.0):
        gen = torch.Generator().manual_seed(T + Dk)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=gen)

        q, k, v = draw(B, T, G, Dk), F.normalize(draw(B, T, G, Dk), dim=-1), draw(B, T, H, Dv)
        shape = {"none": None, "head": (B, T, H), "channel": (B, T, H, Dk)}[kind]
        g = None if shape is None else (strength * F.logsigmoid(draw(*shape))).to(device)
        beta = (most * draw(B, T, H).sigmoid()).to(device)
        S = draw(B, H, Dk, Dv).to(device) if state else None
        ids = None
        if docs is not None:
            ids = torch.repeat_interleave(torch.arange(len(docs)), torch.tensor(docs)).expand(B, -1).to(device)
        return name, (*(x.to(device, dtype) for x in (q, k, v)), beta, g, 0.5, S, ids, 64)

    yield case("no decay, shared keys", "none", 65, G=1, H=2, state=True)
    yield case("negative eigenvalues", "none", 63, B=2, most=2.0)
    yield case("decay per head, shared keys, odd sizes", "head", 130, G=1, H=2, Dk=24, Dv=40, state=True)
    yield case("decay per channel", "channel", 130, state=True)
    yield case("decay per channel, shared keys, odd sizes", "channel", 65, G=1, Dk=24, Dv=40)
    # a document of one token, borders at and inside chunks and sub-chunks
    yield case("documents, none", "none", 70, docs=[1, 63, 1, 5], state=True)
    yield case("documents, head", "head", 130, docs=[1, 63, 6, 1, 59], state=True)
    yield case("documents, channel", "channel", 100, docs=[3, 1, 28, 32, 1, 35], state=True)
    yield case("everything is forgotten, head", "head", 66, strength=60.0, state=True)
    yield case("everything is forgotten, channel", "channel", 33, strength=60.0, state=True)
    yield case("nothing is written", "head", 33, most=0.0, state=True)
    yield case("one token", "head", 1, G=1, state=True)
    yield case("two tokens", "channel", 2)
