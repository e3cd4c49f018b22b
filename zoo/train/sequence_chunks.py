"""Backward chunk by chunk of a row: SeCO and SpaCO, arXiv:2505.16710.

The row runs forward once without a graph, and only the streaming states at the borders of its chunks are kept. Then,
from the last chunk to the first, each runs again with a graph from the state in front of it, and goes backward with
its loss and the gradient that later chunks left at the state behind it. Activations in memory are those of one chunk,
the gradient is that of the whole row, and all chunks but the last run forward twice.

SpaCO: only chunks that were drawn, each with probability `keep`, go backward, and what flows back through one, from
its loss and from the state behind it, counts 1 / keep times as much. A path of the gradient through m chunks survives
with probability keep^m and counts keep^-m times as much, so the expected gradient is that of the whole row. (The paper
draws a fixed number of chunks, for which that holds nearly.) What passes by a chunk, as the keys of earlier tokens in
a cache do, is neither lost nor scaled.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from zoo.contract import Block, State, weighted_auxiliary
from zoo.errors import ConfigError, Problem
from zoo.graph.nodes import Node
from zoo.parallel import shard
from zoo.sections import DataSection, ParallelSection, TrainSection
from zoo.segments import differentiable_states, rehearsal
from zoo.train.job import Job

# (tokens of a row, state in front of them, whether the loss is wanted) -> the loss, or anything; moves the state on
Run = Callable[[slice, State, bool], Tensor]
WHERE = "train.sequence_chunks"


# ------------------------------------------------------------------------------------------ what is refused
def check(model: Any, train: TrainSection, layout: ParallelSection, data: DataSection, distilled: bool) -> None:
    """Raise ConfigError with all that is in the way of `train.sequence_chunks`, where it is given. `model` may be on
    the meta device."""
    if not train.sequence_chunks.size:
        return
    found = [
        Problem(f"goes with parallel.{name}: 1; dp_shard and dp_replicate give ranks rows of their own", WHERE)
        for name in ("tp", "cp", "pp", "ep")
        if getattr(layout, name) > 1
    ]
    if distilled:
        found.append(Problem("a student learns from whole rows", WHERE))
    if data.doc_ids:
        found.append(Problem("packed documents have no state: data.doc_ids: false trains rows as they are", WHERE))
    if not model.rows:
        text = f"{type(model).__name__} does not read rows of text from left to right, which alone are cut"
        found.append(Problem(text, WHERE))
    else:
        found += [Problem(f"{name}: {why}; use another in its place", WHERE) for name, why in obstacles(model)]
    if found:
        raise ConfigError(found)


def obstacles(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Blocks and nodes that cannot be trained on a row in chunks, and why."""
    for path, module in model.named_modules():
        if isinstance(module, (Block, Node)):
            card = getattr(type(module), "zoo_registration", None)
            name = f"{path}: {card.name if card else type(module).__name__}"
            if isinstance(module, Block) and not (module.causal and (card is None or card.streaming)):
                yield name, "does not read from left to right"
            elif module.cuts_gradient:
                yield name, module.cuts_gradient


# --------------------------------------------------------------------------------------------- forward, backward
def new_state(model: Any, rows: int, length: int, device: torch.device) -> State:
    """An empty state on `device`. `model` is on the meta device: one whose weights are spread over ranks has none."""
    state = model.init_state(rows, length).map(lambda t: torch.empty_like(t, device=device))
    state.reset()
    return state


def cut(length: int, size: int) -> list[slice]:
    """Chunks of a row."""
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def draw(count: int, keep: float) -> list[bool]:
    """Which chunks go backward, from torch's CPU generator: the same on ranks that are seeded alike."""
    return (torch.rand(count) < keep).tolist()


def backward(run: Run, state: State, chunks: list[slice], drawn: list[bool], keep: float = 1.0) -> Tensor:
    """Add the gradient of the loss of rows in `chunks` to all parameters, and return the loss. Of the chunks those in
    `drawn` go backward, each of them with probability `keep`. `state` is that in front of the rows, and is moved on."""
    length = chunks[-1].stop
    borders, total = _forward(run, chunks, state, drawn)
    behind: list[Tensor | None] = []  # gradients of the state behind a chunk; none behind the last one
    after: State | None = None
    for i in reversed(range(len(chunks))):
        before = borders.pop()
        past, through = behind, behind
        if after is not None and keep < 1:
            past, through = _parted(before, after, behind)
        if drawn[i]:
            gradients = through if through is past else [_sum(g, p, keep) for g, p in zip(through, past, strict=True)]
            with weighted_auxiliary((chunks[i].stop - chunks[i].start) / length / keep):
                loss, behind = _chunk_backward(run, chunks[i], before, gradients, 1 / keep, i > 0)
            total = total + loss
        else:
            behind = past
        after = before
    return total


def _forward(run: Run, chunks: list[slice], state: State, drawn: list[bool]) -> tuple[list[State], Any]:
    """The states in front of the chunks, and the loss of those that will not run again."""
    borders: list[State] = []
    total: Any = 0.0
    for chunk, again in zip(chunks, drawn, strict=True):
        borders.append(state.mark())
        if again and len(borders) == len(chunks):
            break  # its loss is found when it runs again, and nobody needs the state behind it
        with torch.no_grad():
            if again:
                with rehearsal():
                    run(chunk, state, False)
            else:
                total = total + run(chunk, state, True)
    return borders, total


def _chunk_backward(
    run: Run, chunk: slice, border: State, behind: list[Tensor | None], scale: float, wanted: bool
) -> tuple[Tensor, list[Tensor | None]]:
    """The loss of a chunk, and (where `wanted`) the gradient of the state in front of it."""
    leaves = border.map(lambda t: t.detach().requires_grad_(wanted and t.is_floating_point()))
    state = leaves.clone()
    with differentiable_states():
        loss = run(chunk, state, True)
    ends = [(t, g) for t, g in zip(state.tensors(), behind) if g is not None and t.requires_grad]
    torch.autograd.backward([loss, *(t for t, _ in ends)], [torch.full_like(loss, scale), *(g for _, g in ends)])
    return loss.detach(), [t.grad for t in leaves.tensors()]


class ChunkedBackward:
    """To be mixed into torchtitan's Trainer, whose model takes `state`; without `labels` it only moves that on."""

    job: Job
    model_parts: list[Any]
    loss_fn: Any
    train_context: Any

    def _forward_backward_body(self, inputs: Tensor, labels: Tensor, valid: Tensor, more: dict[str, Any]) -> Tensor:
        section = self.job.train.sequence_chunks
        if not section.size:
            return super()._forward_backward_body(inputs, labels, valid, more)  # type: ignore[misc]

        def run(where: slice, state: State, wanted: bool) -> Tensor:
            if not wanted:
                return self.model_parts[0](inputs[:, where], state=state)
            losses = self.model_parts[0](inputs[:, where], state=state, labels=labels[:, where])
            return self.loss_fn(losses, labels, valid)[0]

        rows, length = inputs.shape
        chunks, state = cut(length, section.size), new_state(self._blank, rows, length, inputs.device)
        drawn = draw(len(chunks), section.keep)
        with self.train_context():
            loss = backward(run, state, chunks, drawn, section.keep)
        if not any(drawn):
            shard.free(self.model_parts[0])  # no backward pass did it
        return loss

    @functools.cached_property
    def _blank(self) -> nn.Module:
        return self.job.build("meta")


# ------------------------------------------------------------------------------------------- chunks left out
def _parted(
    before: State, after: State, gradients: list[Tensor | None]
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Of the gradients of a state behind a chunk: what belongs to slots that were as full in front of it, and what the
    chunk has written."""
    past: list[Tensor | None] = []
    written: list[Tensor | None] = []
    rest = iter(gradients)
    for early, late in zip(before.walk(), after.walk(), strict=True):
        kept = late.untouched(early)
        for _, g in zip(late.own_tensors(), rest):
            if g is None or kept is None:
                past.append(None)
                written.append(g)
            else:
                mask = kept.reshape(*kept.shape, *(1,) * (g.dim() - 2))
                past.append(g.masked_fill(~mask, 0))
                written.append(g.masked_fill(mask, 0))
    return past, written


def _sum(written: Tensor | None, past: Tensor | None, keep: float) -> Tensor | None:
    if written is None:
        return past
    return written / keep if past is None else torch.add(past, written, alpha=1 / keep)
