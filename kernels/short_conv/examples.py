"""Small calls of the short convolution, as its rows receive them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


def examples(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Name and arguments (x, weight, bias, state, doc_ids, activation) of each."""

    def case(name, T, D=40, W=4, batch=2, bias=False, state=False, docs=None, activation=None):
        gen = torch.Generator().manual_seed(T + D)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=gen).to(device, dtype)

        ids = None
        if docs is not None:
            ids = torch.repeat_interleave(torch.arange(len(docs)), torch.tensor(docs)).expand(batch, -1).to(device)
        x, weight = draw(batch, T, D), draw(D, W)
        return name, (
            x, weight, draw(D) if bias else None, draw(batch, W - 1, D) if state else None, ids, activation,
        )  # fmt: skip

    yield case("plain", 65)
    yield case("bias and silu", 70, bias=True, activation="silu")
    yield case("state", 67, bias=True, state=True, activation="silu")
    yield case("documents", 70, bias=True, docs=[1, 2, 30, 1, 36], activation="silu")
    yield case("a state before documents is not theirs", 64, state=True, docs=[32, 32])
    yield case("fewer tokens than taps", 2, W=5, D=1024, state=True)
    yield case("one token", 1, D=1024, state=True, activation="silu")
    yield case("one tap", 33, W=1)
    yield case("odd width", 64, D=37, batch=1, bias=True, activation="silu")
