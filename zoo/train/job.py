"""A training run as the trainer sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from zoo.sections import ParallelSection, TrainSection
from zoo.train.evaluate import Share
from zoo.train.hub import HubRows
from zoo.train.incidents import Incident
from zoo.train.loader import Rows


@dataclass
class Job:
    """One training run. `build(device)` gives the model; `on_step(record)` is called after each step, with what
    `evaluate(model, share)` returned in steps that are due; `stop()` ends the run after a step.

    Every process has the same job; `on_step` and `stop` may differ.

    `objective(model, inputs, labels, step)` gives losses [B] in place of the cross-entropy of the logits, and
    `prepare(model)` changes a model that was just drawn. `on_incident(incident)` is called after a step that was
    skipped, `on_health(record)` in each `health_every`th. `losses` are those of the steps before `resume_from`, of
    which the last `skips` were skipped.
    """

    build: Callable[[str], nn.Module]
    train: TrainSection
    rows: Rows | HubRows
    parallel: ParallelSection = field(default_factory=ParallelSection)
    folder: Path | None = None
    resume_from: int | None = None
    on_step: Callable[[dict[str, Any]], None] = lambda record: None
    evaluate: Callable[[nn.Module, Share], dict[str, float]] | None = None
    stop: Callable[[], bool] = lambda: False
    objective: Callable[[nn.Module, Tensor, Tensor, int], Tensor] | None = None
    prepare: Callable[[nn.Module], None] = lambda model: None
    on_incident: Callable[[Incident], None] = lambda incident: None
    on_health: Callable[[dict[str, Any]], None] = lambda record: None
    losses: Sequence[float] = ()
    skips: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Nothing: torchtitan writes its configuration out, and this is none of it."""
        return {}


@dataclass(frozen=True)
class Trained:
    """What a job came to. state: whole tensors by name; on several processes only the first one has them."""

    state: dict[str, Tensor]
    parameters: int
    step: int
