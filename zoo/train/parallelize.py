"""Recomputation and compilation of layers, between construction and the first step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import flop_registry

from zoo.kernels.work import is_kept
from zoo.sections import TrainSection

COMPILE_BACKEND = "inductor"


def parallelize(model: nn.Module, train: TrainSection) -> None:
    """Prepare `model` (on the meta device, `model.layers` being its layers) in place. Names of parameters stay."""
    layers: list[Any] = list(dict.fromkeys(model.layers))  # type: ignore[arg-type]  # a shared layer stands there often
    recomputed = layers
    if train.activation_checkpoint == "none":
        recomputed = []
    elif train.activation_checkpoint == "budget":
        recomputed = cheapest(layers, train.activation_budget, train.seq_len, model.dim)  # type: ignore[arg-type]
    for layer in layers:
        if layer in recomputed:
            layer.forward = _recomputed(layer.forward, train.activation_checkpoint == "selective")
        if train.compile:
            layer.compile(backend=COMPILE_BACKEND)


def cheapest(layers: list[Any], budget: float, seq_len: int, dim: int) -> list[Any]:
    """The layers to recompute so that at most a share `budget` of all activations is kept, by the cost model: those
    first that give most memory for a FLOP. A recomputed layer still keeps its input."""
    kept, saved, work = 0, {}, {}
    for layer in layers:
        costs = [leaf.cost for leaf in layer.leaves(1, seq_len, 0, "train")]
        activations = sum(c.activation_bytes for c in costs)
        saved[layer] = activations - seq_len * dim * next(layer.parameters()).element_size()
        work[layer] = 1 + sum(c.flops for c in costs)
        kept += activations
    allowed, chosen = budget * kept, []
    for layer in sorted(layers, key=lambda one: -saved[one] / work[one]):
        if kept <= allowed or saved[layer] <= 0:
            break
        chosen.append(layer)
        kept -= saved[layer]
    return chosen


def _recomputed(forward: Callable[..., Any], selective: bool) -> Callable[..., Any]:
    # replaces the bound method instead of wrapping the module: a wrapper would rename every parameter
    more: dict[str, Any] = {"context_fn": partial(create_selective_checkpoint_contexts, _policy)} if selective else {}

    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **more, **kwargs)

    return run


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep the results of matrix products, attention and scans: of every operator that torch counts FLOPs of. But not
    tables of scores, one for each pair of tokens: of batches of matrices a product with more numbers than both have,
    nor one of vectors, which takes no longer than to read what it reads."""
    kind = getattr(operator, "overloadpacket", operator)
    kept = kind in flop_registry
    if kind in (torch.ops.aten.bmm, torch.ops.aten.baddbmm):
        a, b = args[-2:]
        kept = is_kept(a.shape[1], a.shape[2], b.shape[2])
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
