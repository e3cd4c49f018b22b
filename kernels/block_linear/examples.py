"""Small calls of the block-structured linear maps, as their rows receive them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


def examples(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Name and arguments (x, right, left, mix) of each."""

    def case(rows, right, left=None, mix=None):
        gen = torch.Generator().manual_seed(rows)
        x = torch.randn(rows, right[0] * right[2], generator=gen)
        weights = []
        for shape in (right, left, mix):
            scale = 1.0 if shape is None else shape[-1] ** -0.5 if shape is not mix else shape[1] ** -0.5
            weights.append(None if shape is None else (torch.randn(shape, generator=gen) * scale).to(device, dtype))
        return (x.to(device, dtype), *weights)

    yield "block-diagonal", case(65, (3, 24, 40))
    yield "one block", case(5, (1, 17, 33))
    yield "one row", case(1, (4, 16, 16))
    yield "monarch", case(70, (4, 16, 20), (4, 24, 16))
    yield "monarch, ranks that differ", case(33, (3, 20, 16), (6, 17, 10))  # not a part of each to each
    yield "monarch, fewer blocks behind", case(9, (6, 4, 8), (2, 40, 12))
    yield "monarch, one row", case(1, (2, 16, 16), (4, 16, 8))
    yield "blast", case(40, (4, 24, 16), (4, 20, 24), (4, 4, 24))
    yield "blast, blocks of other numbers", case(33, (3, 40, 12), (5, 7, 40), (5, 3, 40))
    yield "blast, one block", case(17, (1, 16, 24), (1, 24, 16), (1, 1, 16))
    yield "no rows", case(0, (2, 16, 16), (2, 16, 16))
