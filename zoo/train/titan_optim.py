"""Our optimizers, groups and schedules as torchtitan takes them. Imported behind `zoo.train.titan_adapters`, which
binds the device before anything of torchtitan is loaded."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torchtitan.components.optimizer import LRSchedulersContainer, OptimizersContainer, ParamGroupConfig

from zoo.sections import TrainSection
from zoo.train.optim import Group, factory


class Optimizers(OptimizersContainer):
    """torchtitan's, with the optimizers that it does not know; a stage of a pipeline may lack a group."""

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        pass

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Callable[..., torch.optim.Optimizer]:
        return factory(name) or OptimizersContainer._resolve_optimizer_factory(name)

    @staticmethod
    def _build_param_groups(model: nn.Module, param_group_configs: list[ParamGroupConfig], impl_kwargs: Any) -> Any:
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        here = [g for g in param_group_configs if any(re.search(g.pattern, name) for name in names)]
        return OptimizersContainer._build_param_groups(model, here, impl_kwargs)


def optimizers(groups: list[Group]) -> Optimizers.Config:
    """The configuration of the optimizers of a model under the name `model`."""
    return Optimizers.Config(param_groups=[_group(g) for g in groups])


def _group(group: Group) -> ParamGroupConfig:
    names = "|".join(re.escape(f"model.{name}") for name in group.names)
    return ParamGroupConfig(pattern=rf"^(?:{names})$", optimizer_name=group.optimizer, optimizer_kwargs=group.options)


def lr_schedule(train: TrainSection) -> LRSchedulersContainer.Config:
    """The configuration of the learning rate's schedule."""
    wsd = train.schedule == "wsd"
    return LRSchedulersContainer.Config(
        warmup_steps=min(train.warmup_steps, train.steps),
        decay_ratio=train.decay_fraction if wsd else None,
        decay_type=train.wsd_decay if wsd else train.schedule,  # type: ignore[arg-type]
        min_lr_factor=train.min_lr_factor,
    )
