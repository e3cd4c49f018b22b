"""Which optimizer updates which parameter, with which settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from zoo.sections import TrainSection
from zoo.train.lowbit import adamw8bit
from zoo.train.muon import Muon
from zoo.train.select import nothing, parameters


@dataclass(frozen=True)
class Group:
    """Parameters, by name, that one optimizer updates with the same options."""

    names: tuple[str, ...]
    optimizer: str
    options: dict[str, Any]


def groups(model: nn.Module, train: TrainSection) -> list[Group]:
    """Every trained parameter in one group. ConfigError where an entry of `train.groups` matches none."""
    scales, decays = {}, {}
    for i, given in enumerate(train.groups):
        names = parameters(model, given.match)
        if not names:
            raise nothing(model, given.match, f"train.groups[{i}].match")
        scales |= dict.fromkeys(names, given.lr_scale)
        decays |= dict.fromkeys(names, train.weight_decay if given.weight_decay is None else given.weight_decay)
    rest = "AdamW8bit" if train.optimizer == "adamw8bit" else "AdamW"
    hidden = matrices(model) if train.optimizer == "muon" else set()
    spared = _declared(model, "not_decayed")
    members: dict[tuple[str, float, float], list[str]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            decay = decays.get(name, train.weight_decay) if p.ndim > 1 and name not in spared else 0.0
            key = ("Muon" if name in hidden else rest, scales.get(name, 1.0), decay)
            members.setdefault(key, []).append(name)
    made = []
    for (optimizer, scale, decay), names in members.items():
        if optimizer == "Muon":
            options: dict[str, Any] = {"lr": scale * (train.muon_lr or train.lr), "momentum": train.muon_momentum}
        else:
            options = {"lr": scale * train.lr, "betas": train.betas, "eps": 1e-8}
        made.append(Group(tuple(names), optimizer, options | {"weight_decay": decay}))
    return made


def matrices(model: nn.Module) -> set[str]:
    """Parameters of the trunk that map one hidden vector to another: weights of linear layers, and what a module
    declares as `matrices` (experts, one matrix each). A map to a single number is a vector."""
    trunk: Any = model.layers
    inside = {id(p) for p in trunk.parameters()}
    declared = _declared(model, "matrices")
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            declared.add(f"{name}.weight")
    return {n for n, p in model.named_parameters() if n in declared and id(p) in inside and min(p.shape[-2:]) > 1}


def _declared(model: nn.Module, attribute: str) -> set[str]:
    """Full names of the parameters that the classes of the modules list under `attribute`."""
    return {f"{at}.{own}" for at, m in model.named_modules() for own in getattr(type(m), attribute, ())}


def factory(name: str) -> Callable[..., torch.optim.Optimizer] | None:
    """The optimizers that torchtitan does not know."""
    if name == "AdamW8bit":
        return adamw8bit()
    return Muon if name == "Muon" else None
