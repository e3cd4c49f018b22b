"""Small calls of block_scores, as its rows receive them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


def examples(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Name and arguments (q, keys, q_index, k_index, q_doc_ids, k_doc_ids, scale) of each."""

    def case(name, T, N, *, Hq=4, Hkv=2, D=16, size=4, offset=0, docs=None, dropped=()):
        gen = torch.Generator().manual_seed(T + N)
        q, keys = (torch.randn(2, n, h, D, generator=gen).to(device, dtype) for n, h in ((T, Hq), (N, Hkv)))
        k_index = torch.arange(1, N + 1) * size - 1
        k_index[list(dropped)] = -1
        q_index = torch.arange(T) + torch.tensor([[offset], [offset + 3]])
        of_keys = k_index.expand(2, N).clone()
        ids = (None, None)
        if docs is not None:
            border = torch.tensor(docs)
            ids = tuple(torch.bucketize(x, border, right=True).to(device) for x in (q_index, of_keys))
        return name, (q, keys, q_index.to(device), of_keys.to(device), *ids, 0.3)

    yield case("past blocks", 70, 17)
    yield case("a head of its own for each query head", 33, 9, Hkv=4, D=24)
    yield case("documents and slots without a block", 40, 10, docs=[9, 20, 21], dropped=(3, 9))
    yield case("decode", 1, 66, Hq=6, offset=261, dropped=(65,))
    yield case("nothing visible", 3, 5, dropped=range(5))
