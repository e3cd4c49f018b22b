"""The part of the trainer that looks at its steps: at some how every node is, at each whether it may be taken."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from zoo.errors import ZooError
from zoo.train.health import gradients_of, measured, outputs_of, record
from zoo.train.incidents import BadStep, Judge, buffers_of, find, keep
from zoo.train.job import Job
from zoo.train.sites import Site, sites_of


class Guard:
    """To be mixed into torchtitan's Trainer. A step that the judge refuses is run again to find the node to blame, is
    written down, and is then left out, or ends the run."""

    job: Job
    parts: list[Any]
    parameters: list[nn.Parameter]
    step: int
    ntokens_seen: int
    gradient_accumulation_steps: int
    lr_schedulers: Any
    drop_gradients: Callable[[], None]
    loss_of_all_ranks: Callable[[Tensor], float | None]

    def watch(self) -> None:
        """Begin, once the model is there."""
        train = self.job.train
        self.sites: list[Site] = []
        self.gradients: dict[str, float] = {}
        self.judge = Judge(train, self.job.losses)
        self.skips = self.job.skips  # steps in a row that were not taken
        self.may_skip = train.on_nan == "skip" or bool(train.spike_factor and train.on_spike == "skip")
        self.pieces: list[tuple[Any, Any, Tensor]] = []  # of this step's batch
        self.loss: Tensor | None = None

    def train_step(self, data_iterator: Iterator[Any]) -> None:
        """A step, or none: then `skips` is not 0."""
        self.draw_from_step()
        self.pieces, self.loss = [], None
        restore = buffers_of(self.parts) if self.may_skip else None
        layers = {f"layers.{name}": layer for part in self.parts for name, layer in part.layers.named_children()}
        with outputs_of(layers if self._looks else {}) as outputs:
            try:
                super().train_step(data_iterator)  # type: ignore[misc]
            except BadStep as bad:
                self._incident(bad, restore)
                return
        self.skips = 0
        if self._looks:
            found = measured(self.parts, self._sites())
            self.job.on_health(record(self.step, self._sites(), self.gradients, outputs, found))

    @property
    def _looks(self) -> bool:
        """Whether this step is one of those in which the nodes are looked at."""
        every = self.job.train.health_every
        return bool(every) and self.step % every == 0

    def _sites(self) -> list[Site]:
        if not self.sites:
            self.sites = sites_of(self.job.build("meta"))
        return self.sites

    def draw_from_step(self) -> None:
        """A step's random numbers are its own: checkpoints hold no generator state, and a step can be run again."""
        key = f"{self.job.train.seed}/{self.step}"
        torch.manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big"))

    def forward_backward_step(self, *, input_dict: Any, labels: Any, global_valid_tokens: Tensor) -> Tensor:
        """A piece of the step; behind the last one stands the judge."""
        loss = self._piece(input_dict, labels, global_valid_tokens)
        self.pieces.append((input_dict, labels, global_valid_tokens))
        self.loss = loss.detach().clone() if self.loss is None else self.loss.add_(loss.detach())
        if len(self.pieces) == self.gradient_accumulation_steps:
            self.judge(self.loss_of_all_ranks(self.loss), self.parameters)
            if self._looks:
                self.gradients = gradients_of(self.parts, self._sites())  # before they are clipped
        return loss

    def _piece(self, inputs: Any, labels: Any, valid: Tensor) -> Tensor:
        loss = super().forward_backward_step(  # type: ignore[misc]
            input_dict=inputs, labels=labels, global_valid_tokens=valid
        )
        for p in self.parameters:
            # the optimizer state of a parameter that a step did not use must exist too, or it cannot be restored
            if p.requires_grad and p.grad is None:
                p.grad = torch.zeros_like(p)
        self.drop_gradients()
        return loss

    def _again(self) -> None:
        self.draw_from_step()
        for piece in self.pieces:
            self._piece(*piece)

    def _incident(self, bad: BadStep, restore: Callable[[], None] | None) -> None:
        train, seen = self.job.train, self.ntokens_seen
        node, nodes = find(self._sites(), self.parts, self._again)
        self.ntokens_seen = seen
        policy = train.on_spike if bad.kind == "spike" else train.on_nan
        skipped = policy == "skip" and self.skips < train.max_skips
        incident = keep(self.job.folder, bad, self.step, skipped, node, nodes, self.pieces)
        if restore is None or not skipped:
            before = f" after {self.skips} skipped steps" if policy == "skip" else ""
            advice = "lower train.lr, or raise train.warmup_steps"
            raise ZooError(f"training diverged{before}: {incident}; {advice}{incident.where}")
        self.skips += 1
        restore()
        self.lr_schedulers.step()  # the rate belongs to the number of the step
        self.job.on_incident(incident)
