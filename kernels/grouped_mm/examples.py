"""Small calls of the grouped product, as its rows receive them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


def examples(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Name and arguments (x, weight, counts) of each."""

    def case(name, counts, K=32, M=48, transposed=False):
        gen = torch.Generator().manual_seed(K + M)
        x = torch.randn(sum(counts), K, generator=gen)
        weight = torch.randn(len(counts), M if transposed else K, K if transposed else M, generator=gen) / K**0.5
        weight = weight.to(device, dtype)
        weight = weight.transpose(1, 2) if transposed else weight
        return name, (x.to(device, dtype), weight, torch.tensor(counts).to(device))

    yield case("groups of all sizes", [3, 0, 70, 1, 0, 16])
    yield case("one group", [65])
    yield case("all rows in the last group", [0, 0, 0, 33])
    yield case("odd widths", [5, 0, 20], K=37, M=21)
    yield case("transposed weights", [40, 9, 0], transposed=True)
    yield case("no rows", [0, 0])
