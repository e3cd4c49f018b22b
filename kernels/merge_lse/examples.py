"""Small calls of merge_lse, as its rows receive them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


def examples(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Name and arguments (outputs, lses) of each."""
    gen = torch.Generator().manual_seed(0)
    o = torch.randn(3, 2, 5, 2, 4, generator=gen).to(device, dtype)
    lse = torch.randn(3, 2, 5, 2, generator=gen).to(device, dtype)
    empty = lse.clone()
    empty[1], empty[:, :, 2] = -torch.inf, -torch.inf
    yield "three sets", (o, lse)
    yield "one set", (o[:1], lse[:1])
    yield "an empty set, and tokens without any", (o, empty)
    yield "far apart", (o, lse * 200)
