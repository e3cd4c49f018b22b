"""Costs of models that choose, for the choices of one pass: what is expected of tokens gives way to what they did."""

from __future__ import annotations

import pytest
import torch

from zoo.contract import Router
from zoo.graph.dynamic_chunks import DynamicChunks


def as_drawn(monkeypatch: pytest.MonkeyPatch, model: torch.nn.Module) -> None:
    """After a pass of `model` its predicted costs are those of its own choices, not of those expected in the end."""
    for module in model.modules():
        router = getattr(module, "router", None)
        if isinstance(router, Router):
            _watch_picks(monkeypatch, router, getattr(module, "shares_keys", False) or router.reads_all)
        if isinstance(module, DynamicChunks):
            _watch_chunks(monkeypatch, module)


def _watch_picks(monkeypatch, router, reads):
    drawn = {}

    def pick(step, x, carry, streaming, pick=router.pick):
        found = pick(step, x, carry, streaming)
        if found.index is not None:
            drawn[step] = found.index.shape[1] / x.shape[1]
        elif found.mask is not None:
            taken = found.mask.sum(1).double()
            # rows are filled up to the longest one, but where each has a state of its own
            drawn[step] = float(taken.mean() if streaming and not reads else taken.max()) / x.shape[1]
        return found

    monkeypatch.setattr(router, "pick", pick)
    monkeypatch.setattr(router, "share", lambda step: drawn.get(step, 1.0))


def _watch_chunks(monkeypatch, chunker):
    def boundaries(x, *rest, boundaries=chunker.boundaries):
        p = boundaries(x, *rest)
        monkeypatch.setattr(chunker, "ratio", max(x.shape[1] / max(1, int((p >= 0.5).sum(1).max())), 1.001))
        return p

    monkeypatch.setattr(chunker, "boundaries", boundaries)
