"""Small calls of select_blocks, as its rows receive them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


def examples(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Name and arguments (q, keys, k, q_index, k_index, q_doc_ids, k_doc_ids, scale, forced, visible) of each."""

    def case(name, T, N, k, *, Hq=4, Hkv=2, D=16, offset=0, docs=None, equal=False, forced=None, visible=None):
        gen = torch.Generator().manual_seed(T + N)
        # whole numbers: the scores, and so the choice, are exact in every dtype
        q, keys = (torch.randint(-8, 9, (2, n, h, D), generator=gen) for n, h in ((T, Hq), (N, Hkv)))
        if equal:
            keys = keys[:, :1].expand(2, N, Hkv, D) * (torch.arange(N) % 3 - 1)[:, None, None]
        q, keys = (x.to(device, dtype) for x in (q, keys))
        q_index = (torch.arange(T) + torch.tensor([[offset], [offset + 3]])).to(device)
        k_index = torch.arange(1, N + 1).mul(4).sub(1).repeat(2, 1).to(device)
        ids = (None, None)
        if docs is not None:
            ids = tuple(torch.bucketize(x, torch.tensor(docs, device=device), right=True) for x in (q_index, k_index))
        rules = (None if x is None else x.to(device) for x in (forced, visible))
        return name, (q, keys, k, q_index, k_index, *ids, 0.5, *rules)

    yield case("past blocks", 21, 17, 3, offset=50)
    yield case("one block", 15, 9, 1, Hkv=4, D=24, offset=20)
    yield case("documents", 16, 15, 4, Hkv=4, offset=40, docs=[9, 20, 21, 50])
    yield case("equal scores", 5, 35, 5, Hq=2, Hkv=1, offset=130, equal=True)
    some = torch.arange(9) % 4 == torch.arange(16)[:, None] % 4
    yield case("forced and hidden blocks", 16, 9, 3, Hkv=4, offset=20, forced=some, visible=torch.arange(9) != 5)
    yield case("all blocks", 7, 10, 10, Hkv=1, offset=30)
    yield case("decode", 1, 40, 6, Hq=6, offset=150)
    yield case("nothing visible", 3, 5, 2)
    yield case("none wanted", 3, 5, 0)
