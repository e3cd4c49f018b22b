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
from zoo.graft.plan import Plan

Progress = Callable[[str, int, float], None]


def distill(
    plan: Plan,
    batches: Iterable[Any],
    *,
    layer_steps: int = 100,
    model_steps: int = 100,
    lr: float = 1e-3,
    progress: Progress | None = None,
) -> dict[str, list[float]]:
    """Train the blocks of an applied plan, and nothing else of the model.

    First each block alone: it reads what the original read in the original model and is to say what the original
    said (mean squared error over its variance), for `layer_steps` batches. Then all together: the logits of the
    changed model against those of the original (KL divergence), for `model_steps` batches. Losses that a block adds
    itself, such as that of a gate, count in both. batches: what the model is
    called with, a tensor or a mapping of keyword arguments; it must give enough. Returns the losses of both stages.
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
def _training(plan: Plan) -> Iterator[None]:
    """Only while they train do blocks add losses of their own, from which a gate that selects keys learns."""
    modes = {block: block.training for block in plan.blocks.values()}
    try:
        for block in modes:
            block.train()
        yield
    finally:
        for block, mode in modes.items():
            block.train(mode)


def _layers(plan: Plan, batch: Any) -> Tensor:
    seen = dict(_record(plan, batch))
    total = torch.zeros(())
    with _training(plan):
        for site, (args, kwargs, wanted) in seen.items():
            y = plan.blocks[site](*args, **kwargs)
            y = y[0] if isinstance(y, tuple) else y
            total = total + (F.mse_loss(y, wanted) / wanted.var().clamp(min=1e-8)).to(total.device)
    return total / len(seen)


@torch.no_grad()
def _record(plan: Plan, batch: Any) -> Iterator[tuple[str, tuple[tuple, dict, Tensor]]]:
    """Run the original model, and keep what the replaced modules read and said."""
    found: dict[str, tuple[tuple, dict, Tensor]] = {}

    def keep(site: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
            given = {k: v for k, v in kwargs.items() if k not in CACHES}  # the original has filled it
            found[site] = (args, given, out[0] if isinstance(out, tuple) else out)

        return hook

    plan.undo()
    handles = [o.register_forward_hook(keep(s), with_kwargs=True) for s, o in plan.originals.items()]
    try:
        _call(plan.model, batch)
    finally:
        for handle in handles:
            handle.remove()
        plan.apply()
    yield from found.items()


def _logits(plan: Plan, batch: Any) -> Tensor:
    plan.undo()
    try:
        with torch.no_grad():
            wanted = _call(plan.model, batch).float().log_softmax(-1)
    finally:
        plan.apply()
    with _training(plan):
        got = _call(plan.model, batch).float().log_softmax(-1)
    return F.kl_div(got.flatten(0, -2), wanted.flatten(0, -2), reduction="batchmean", log_target=True)
