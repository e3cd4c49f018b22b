"""Which layouts a model can take. What it cannot do is said before anything is launched."""

from __future__ import annotations

from typing import Any

from torch import nn

from zoo.errors import ConfigError, Problem
from zoo.parallel import context
from zoo.parallel.expert import mixtures
from zoo.parallel.pipeline import stages_per_rank
from zoo.sections import ParallelSection


def check(model: Any, layout: ParallelSection, seq_len: int) -> None:
    """Raise ConfigError with every node of `model` (on the meta device) that `layout` does not suit, the reason and
    what could be done instead. Tensor parallelism suits all: blocks that it does not split are computed whole."""
    found: list[Problem] = []
    if layout.pp > 1:
        found += _pipeline(model, layout)
    if layout.ep > 1:
        found += _experts(model, layout.ep)
    if layout.cp > 1:
        if seq_len % layout.cp:
            found.append(Problem(f"train.seq_len {seq_len} is no multiple of it", "parallel.cp"))
        found += context.refusals(model, layout.cp)
    if found:
        raise ConfigError(found)


def _pipeline(model: Any, layout: ParallelSection) -> list[Problem]:
    found, layers = [], list(model.layers)
    count = layout.pp * stages_per_rank(layout.schedule)
    if len(layers) < count:
        text = f"{layout.schedule} on {layout.pp} ranks needs {count} layers, the trunk has {len(layers)}"
        found.append(Problem(f"{text}; a loop is one layer", "parallel.pp"))
    held = [id(p) for layer in layers for p in layer.parameters()]  # shared ones stand there more than once
    if len(set(held)) < len(held):
        found.append(Problem("layers share weights (share), which stages cannot; use tp or dp_shard", "parallel.pp"))
    if _ties_ends(model):
        found.append(Problem("embedding and head are one matrix; set tie_embeddings: false", "parallel.pp"))
    return found


def _ties_ends(model: nn.Module) -> bool:
    embedding, head = getattr(model, "tok_embeddings", None), getattr(model, "lm_head", None)
    return embedding is not None and head is not None and embedding.weight is head.weight


def _experts(model: nn.Module, degree: int) -> list[Problem]:
    found = mixtures(model)
    if not found:
        return [Problem("there is no mixture of experts in the model; use dp_shard or tp", "parallel.ep")]
    return [
        Problem(f"{path}: {m.num_experts} experts cannot be spread evenly over {degree} ranks", "parallel.ep")
        for path, m in found.items()
        if m.num_experts % degree  # type: ignore[operator]
    ]
