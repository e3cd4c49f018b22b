"""Which optimizer updates which parameter, with which settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from zoo.sections import TrainSection

_NOT_DECAYED = ("A_log", "D", "dt_bias")


@dataclass(frozen=True)
class Group:
    """Parameters, by name, that one optimizer updates with the same options."""

    names: tuple[str, ...]
    optimizer: str
    options: dict[str, Any]


def groups(model: nn.Module, train: TrainSection) -> list[Group]:
    """AdamW with weight decay for matrices, without for vectors and for what SSMs keep undecayed."""
    decayed: dict[bool, list[str]] = {True: [], False: []}
    for name, p in model.named_parameters():
        if p.requires_grad:
            decayed[p.ndim > 1 and name.rpartition(".")[2] not in _NOT_DECAYED].append(name)
    shared = {"lr": train.lr, "betas": train.betas, "eps": 1e-8}
    decay = {True: train.weight_decay, False: 0.0}
    return [Group(tuple(names), "AdamW", shared | {"weight_decay": decay[d]}) for d, names in decayed.items() if names]
