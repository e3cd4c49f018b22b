"""Small calls of select, as its rows receive them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


def examples(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Name and arguments (scores, k, rule, limit, forced, visible) of each."""
    gen = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 2, 9, 12, generator=gen).to(device, dtype)
    forced = (torch.arange(12) == torch.arange(9)[:, None]).to(device)
    visible = (torch.arange(12) <= torch.arange(9)[:, None]).to(device)
    yield "topk", (scores, 3, "topk", 0.0, None, None)
    yield "topk, forced and causal", (scores, 3, "topk", 0.0, forced, visible)
    yield "top_p", (scores, 8, "top_p", 0.7, forced, visible)
    yield "threshold", (scores, 8, "threshold", 0.3, forced, visible)
    yield "equal scores", (torch.zeros_like(scores), 4, "topk", 0.0, None, visible)
    yield "nothing visible", (scores, 3, "topk", 0.0, None, torch.zeros_like(visible))
    yield "none wanted", (scores, 0, "topk", 0.0, None, None)
