"""Small calls of the linear map, as its rows receive them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


def examples(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Name and arguments (x, weight, bias) of each."""

    def case(name, *shape, K=40, N=24, bias=False, transposed=False):
        gen = torch.Generator().manual_seed(K + N)

        def draw(*sizes: int) -> torch.Tensor:
            return torch.randn(sizes, generator=gen).to(device, dtype)

        weight = draw(K, N).t() if transposed else draw(N, K)
        return name, (draw(*shape, K), weight / K**0.5, draw(N) if bias else None)

    yield case("rows", 33)
    yield case("batch and bias", 2, 20, bias=True)
    yield case("odd widths", 3, 17, K=37, N=21, bias=True)
    yield case("transposed weight", 40, transposed=True)
    yield case("one row", 1)
    yield case("no rows", 0)
    yield case("one feature", 2, 30, N=1, bias=True)
    yield case("a few rows", 7, K=150, N=118, bias=True)
    yield case("one row, many features", 1, K=300, N=203)
