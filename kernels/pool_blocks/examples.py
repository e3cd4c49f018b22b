"""Small calls of pool_blocks, as its rows receive them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


def examples(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Name and arguments (x, block_size, mode, doc_ids) of each."""
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(2, 37, 2, 6, generator=gen).to(device, dtype)
    lengths = torch.tensor([1, 9, 16, 11])
    docs = torch.repeat_interleave(torch.arange(4), lengths).expand(2, -1).to(device)
    for mode in ("mean", "max", "min"):
        yield mode, (x, 8, mode, None)
        yield f"{mode} in documents", (x, 8, mode, docs)
    yield "one token", (x[:, :1], 1, "mean", None)
    yield "no whole block", (x[:, :5], 8, "mean", None)
