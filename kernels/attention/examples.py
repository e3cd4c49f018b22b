"""Small calls of attention, as its rows receive them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from zoo.kernels.attention.mask import Mask


def examples(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Name and arguments (q, k, v, mask, scale, softcap, sink_logits, need_lse) of each."""

    def case(name, T=37, S=None, Hq=4, Hkv=2, D=16, Dv=None, softcap=None, sink=False, lse=False, **rules):
        gen = torch.Generator().manual_seed(T + D)
        shapes = ((2, T, Hq, D), (2, S or T, Hkv, D), (2, S or T, Hkv, Dv or D))
        q, k, v = (torch.randn(shape, generator=gen).to(device, dtype) for shape in shapes)
        rules = {"causal": True, "window": None, "sinks": 0} | rules
        mask = Mask(*(rules.get(field) for field in Mask._fields))
        logits = torch.randn(Hq, generator=gen).to(device, dtype) if sink else None
        return name, (q, k, v, mask, D**-0.5, softcap, logits, lse)

    def ids(lengths: list[int]) -> torch.Tensor:
        return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).expand(2, -1).to(device)

    docs = ids([1, 16, 20])
    order = torch.arange(40).expand(2, -1)
    slots = torch.where(torch.arange(48) < 40, torch.arange(48), -1).expand(2, -1)
    later = torch.where(slots >= 0, slots + 1, -1)
    yield case("causal")
    yield case("one token", T=1)
    yield case("all heads alike, not causal", Hkv=4, causal=False)
    yield case("more keys than queries", T=5, S=33, causal=False)
    yield case("window", window=8)
    yield case("window and sinks", window=8, sinks=3)
    yield case("documents", q_doc_ids=docs, k_doc_ids=docs)
    yield case("windows in documents", window=5, q_doc_ids=docs, k_doc_ids=docs)
    yield case("cache", T=40, S=48, q_index=order.to(device), k_index=slots.to(device))
    yield case("a query that sees nothing", T=3, S=48, q_index=order[:, :3].to(device), k_index=later.to(device))
    yield case("soft cap and log-sum-exp", softcap=3.0, lse=True)
    yield case("sink logits", sink=True, lse=True)
    yield case("values of another width", Dv=24)
    # a step against a cache long enough to be cut between threads
    full = torch.where(torch.arange(700) < 650, torch.arange(700), -1).expand(2, -1).to(device)
    last = torch.arange(647, 650).expand(2, -1).to(device)
    step = dict(T=3, S=700, q_index=last, k_index=full)
    yield case("a few tokens and a long cache", D=20, Dv=84, **step)
    yield case("a few tokens, a window and sinks", window=300, sinks=2, **step)
    yield case("a few tokens, soft cap and sink logits", softcap=3.0, sink=True, lse=True, **step)
