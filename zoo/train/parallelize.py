"""Recomputation and compilation of layers, between construction and the first step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from zoo.sections import TrainSection

COMPILE_BACKEND = "inductor"


def parallelize(model: nn.Module, train: TrainSection) -> None:
    """Prepare `model` (on the meta device, `model.layers` being its layers) in place. Names of parameters stay."""
    for layer in dict.fromkeys(model.layers):  # type: ignore[arg-type]  # a shared layer stands there several times
        if train.activation_checkpoint == "full":
            layer.forward = _recomputed(layer.forward)
        if train.compile:
            layer.compile(backend=COMPILE_BACKEND)


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    # replaces the bound method instead of wrapping the module: a wrapper would rename every parameter
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run
