"""Small calls of the structured linear maps, as their rows receive them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


def examples(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Name and arguments (x, first, second, scales) of each."""

    def case(name, rows, first, second=None, scales=None, transposed=False):
        gen = torch.Generator().manual_seed(rows + sum(first))

        def normal(*shape):
            return torch.randn(*shape, generator=gen).to(device, dtype)

        x = normal(rows, first[0] * first[2])
        b, c, k = first
        w = (normal(b, k, c).transpose(1, 2) if transposed else normal(b, c, k)) / k**0.5
        s = normal(*scales) / scales[1] ** 0.5 if scales else None
        return name, (x, w, normal(*second) / second[2] ** 0.5 if second else None, s)

    yield case("block-diagonal", 70, (2, 32, 16))
    yield case("block-diagonal, odd, one row", 1, (3, 21, 37))
    yield case("one block, transposed", 5, (1, 24, 40), transposed=True)
    yield case("Monarch, square", 33, (4, 8, 8), (4, 8, 8))
    yield case("Monarch, rectangular, rank 2", 17, (3, 10, 7), (5, 9, 6))
    yield case("Monarch, l does not divide q", 3, (4, 9, 5), (6, 4, 6))
    yield case("BLAST", 65, (2, 16, 32), (2, 32, 16), (2, 2, 16), transposed=True)
    yield case("BLAST, rectangular, odd", 9, (3, 19, 11), (2, 23, 19), (2, 3, 19), transposed=True)
    yield case("no rows", 0, (2, 4, 6), (2, 5, 4), (2, 2, 4))
