"""Small calls of product_key_lookup, as its rows receive them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


def examples(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Name and arguments (query, sub_keys, values, top_k) of each."""

    def case(name, N=7, H=2, n=5, width=6, Dv=4, top_k=3):
        gen = torch.Generator().manual_seed(N + n)
        query, keys = torch.randn(N, H, width, generator=gen), torch.randn(H, 2, n, width // 2, generator=gen)
        values = torch.randn(n * n, Dv, generator=gen)
        return name, (query.to(device, dtype), keys.to(device, dtype), values.to(device, dtype), top_k)

    yield case("plain")
    yield case("one slot", top_k=1)
    yield case("every slot", n=3, top_k=9)
    yield case("one token, one head", N=1, H=1)
