"""Small calls of prefix_topk, as its rows receive them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


def examples(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Name and arguments (scores, k, chunk_size, doc_ids) of each."""
    scores = torch.randn(2, 37, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    docs = torch.repeat_interleave(torch.arange(4), torch.tensor([1, 9, 16, 11])).expand(2, -1).to(device)
    yield "plain", (scores, 5, 8, None)
    yield "documents", (scores, 5, 8, docs)
    yield "more than there are", (scores, 64, 8, None)
    yield "equal scores", (torch.zeros_like(scores), 3, 4, None)
    yield "no whole chunk", (scores[:, :5], 3, 8, None)
