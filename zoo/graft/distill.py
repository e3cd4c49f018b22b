"""Teaching grafted blocks what the modules they replaced computed: layer by layer, then the whole model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.errors import ConfigError
from zoo.graft.hosted import CACHES
from zoo.graft.pair import Pair, Span
from zoo.graft.plan import Plan

Progress = Callable[[str, int, float], None]


def distill(
    plan: Plan | Pair,
    batches: Iterable[Any],
    *,
    layer_steps: int = 100,
    model_steps: int = 100,
    lr: float = 1e-3,
    progress: Progress | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, list[float]]:
    """Train the blocks of an applied plan, or those in which a pair of models differs, and nothing else of the model.

    First each block alone: it reads what the original read in the original model and is to say what the original
    said (mean squared error over its variance), for `layer_steps` batches. Then all together: the logits of the
    changed model against those of the original (KL divergence), for `model_steps` batches. Losses that a block adds
    itself, such as that of a gate, count in both. batches: what the model is called with, a tensor or a mapping of
    keyword arguments; it must give enough. stop: asked before every step; what was learned until then stays. Returns
    the losses of both stages.
    """
    if not plan.applied:
        raise ConfigError("distill: the plan is not applied")
    model, given = plan.model, iter(batches)
    frozen = {p: p.requires_grad for p in model.parameters()}
    optimizer = torch.optim.AdamW(plan.trainable(), lr=lr, weight_decay=0.0)
    losses: dict[str, list[float]] = {"layers": [], "model": []}
    try:
        for p in frozen:
            p.requires_grad_(False)
        for p in plan.trainable():
            p.requires_grad_(True)
        for stage, steps, loss_of in (("layers", layer_steps, _layers), ("model", model_steps, _logits)):
            for step in range(steps):
                if stop():
                    return losses
                for group in optimizer.param_groups:
                    group["lr"] = lr * (1 - step / steps)
                batch = next(given, None)
                if batch is None:
                    raise ConfigError(f"distill: the batches ended at step {step} of stage {stage!r}")
                loss = loss_of(plan, batch)
                loss.backward()
                nn.utils.clip_grad_norm_(plan.trainable(), 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                losses[stage].append(loss.item())
                if progress:
                    progress(stage, step, losses[stage][-1])
    finally:
        for p, wanted in frozen.items():
            p.requires_grad_(wanted)
    return losses


def _call(model: nn.Module, batch: Any) -> Tensor:
    out = model(**batch) if isinstance(batch, Mapping) else model(batch)
    return out if isinstance(out, Tensor) else out.logits


@contextmanager
def _training(plan: Plan | Pair) -> Iterator[None]:
    """Only while they train do blocks add losses of their own, from which a gate that selects keys learns."""
    modes = {block: block.training for block in plan.blocks.values()}
    try:
        for block in modes:
            block.train()
        yield
    finally:
        for block, mode in modes.items():
            block.train(mode)


def _layers(plan: Plan | Pair, batch: Any) -> Tensor:
    seen = _record(plan, batch)
    total = torch.zeros(())
    with _training(plan):
        for site, (args, kwargs, wanted) in seen.items():
            y = plan.blocks[site](*args, **kwargs)
            y = y[0] if isinstance(y, tuple) else y
            total = total + (F.mse_loss(y, wanted) / wanted.var().clamp(min=1e-8)).to(total.device)
    return total / len(seen)


@torch.no_grad()
def _record(plan: Plan | Pair, batch: Any) -> dict[str, tuple[tuple, dict, Tensor]]:
    """Run the original model, and keep what the replaced modules read and said."""
    read: dict[str, tuple[tuple, dict]] = {}
    said: dict[str, Tensor] = {}

    def keep_read(site: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            read[site] = args, {k: v for k, v in kwargs.items() if k not in CACHES}  # the original fills it

        return hook

    def keep_said(site: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, out: Any) -> None:
            said[site] = out[0] if isinstance(out, tuple) else out

        return hook

    handles = []
    with plan.original() as original:
        try:
            for site, module in plan.originals.items():
                first, last = (module.layers[0], module.layers[-1]) if isinstance(module, Span) else (module, module)
                handles.append(first.register_forward_pre_hook(keep_read(site), with_kwargs=True))
                handles.append(last.register_forward_hook(keep_said(site)))
            _call(original, batch)
        finally:
            for handle in handles:
                handle.remove()
    if not said:
        raise ConfigError(f"distill: the model calls none of {', '.join(plan.originals)} as a module")
    return {site: (*read[site], said[site]) for site in said}


def _logits(plan: Plan | Pair, batch: Any) -> Tensor:
    with plan.original() as original, torch.no_grad():
        wanted = _call(original, batch).float().log_softmax(-1)
    with _training(plan):
        got = _call(plan.model, batch).float().log_softmax(-1)
    return F.kl_div(got.flatten(0, -2), wanted.flatten(0, -2), reduction="batchmean", log_target=True)
