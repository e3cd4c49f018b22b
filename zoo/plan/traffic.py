"""What ranks send each other in a step: bytes that one rank sends, by kind, and how long its link takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from zoo.devices import Device
from zoo.plan.spread import Spread
from zoo.plan.subject import Held, Subject


@dataclass(frozen=True)
class Move:
    """Bytes that a rank sends in a step to the others of its group, whose `ranks` numbers are `stride` apart."""

    kind: str
    ranks: int
    stride: int
    bytes: int
    seconds: float
    inside: bool  # of one node


def moves(subject: Subject, spread: Spread, device: Device, number: int, stages: list[list[int]]) -> Iterator[Move]:
    """Of the pipeline's rank `number`, which holds the units of `stages`. Rings: n ranks that gather S bytes send
    (n - 1) / n S each, and twice that to sum them."""
    units = [u for stage in stages for u in stage]
    every = subject.held(spread.tp, spread.fsdp, spread.ep)
    held = sum((every[u] for u in units), Held())
    pieces = spread.accumulation  # FSDP gathers and reduces for each; a pipeline does so once for its microbatches
    tokens = spread.rows * spread.microbatches * pieces * subject.tokens // spread.cp  # of this rank

    def move(kind: str, ranks: int, stride: int, amount: float) -> Iterator[Move]:
        if ranks > 1 and amount:
            seconds = amount / device.speed(ranks, stride)
            yield Move(kind, ranks, stride, int(amount), seconds, device.joins(ranks, stride))

    # weights: the head's stay for backward, and all of a pipeline's
    experts_over = spread.fsdp // spread.ep
    ring = (spread.fsdp - 1) / spread.fsdp
    experts_ring = (experts_over - 1) / experts_over
    whole = ring * held.gathered + experts_ring * held.experts
    head = ring * sum(every[u].gathered for g in subject.fsdp_groups if subject.head in g for u in g if u in units)
    gathers = whole if spread.pp > 1 else 2 * whole - head
    yield from move("gather weights", spread.fsdp, spread.tp, pieces * gathers)
    yield from move("reduce gradients", spread.fsdp, spread.tp, pieces * whole)
    copies = spread.dp_replicate
    yield from move(
        "sum over copies", copies, spread.tp * spread.fsdp, pieces * 2 * (copies - 1) / copies * held.gradients
    )

    yield from move("tensor: sum increments", spread.tp, 1, sum(_tensor(subject, spread, u, tokens) for u in units))
    yield from move(
        "tensor: sum gradients", spread.tp, 1,
        pieces * spread.microbatches * 2 * (spread.tp - 1) / spread.tp * held.summed,
    )  # fmt: skip
    yield from move("context", spread.cp, spread.tp, _context(subject, spread, units, tokens) if spread.cp > 1 else 0)
    if spread.ep > 1:
        sent = sum(_experts(subject, spread, u, tokens) for u in units)
        yield from move("experts: tokens", spread.ep, 1, sent)

    # the stream behind each stage but the last, its gradient in front of each but the first
    if spread.pp > 1:
        sides = 2 * len(stages) - (number == 0) - (number == spread.pp - 1)
        stream = tokens * subject.model.dim * subject.item
        yield from move("pipeline: stream", 2, spread.ranks // spread.pp, sides * stream)


def _tensor(subject: Subject, spread: Spread, unit: int, tokens: int) -> float:
    """Increments are summed in forward (in their own dtype), gradients of what enters in backward."""
    if spread.tp == 1:
        return 0
    name, item = subject.names[unit], subject.item
    product = 2 if subject.train.dtype == "bfloat16" else item
    ring = (spread.tp - 1) / spread.tp
    if name == "tok_embeddings":
        return 2 * ring * tokens * subject.model.dim * item
    if name == "lm_head":
        scored = tokens / subject.tokens * subject.scored
        return ring * scored * (subject.vocab_size * product + 2 * subject.model.dim * item)
    forward = product * (2 if unit in subject.recomputed else 1)
    splits, total = subject.splits(spread.tp), 0.0
    for work in subject.work[unit]:
        if work.block is not None and not splits[id(work.block)].reason:
            total += 2 * ring * work.stream / item / subject.tokens * tokens * (forward + item)
    return total


def _context(subject: Subject, spread: Spread, units: list[int], tokens: int) -> float:
    """Each rank sends its part to all others, and as much in backward."""
    rows = tokens * spread.cp / subject.tokens
    total = 0.0
    for unit, exchange, calls in subject.exchanges:
        if unit in units:
            passes = calls * (3 if unit in subject.recomputed else 2)
            total += passes * (tokens * exchange.bytes_per_token + rows * exchange.bytes_per_row)
    return (spread.cp - 1) * total


def _experts(subject: Subject, spread: Spread, unit: int, tokens: int) -> float:
    """Tokens go to their experts and results come back, in forward and in backward."""
    passes, total = 3 if unit in subject.recomputed else 2, 0.0
    back = 2 if subject.train.dtype == "bfloat16" else subject.item
    for work in subject.work[unit]:
        if id(work.block) in subject.mixtures:
            choices = subject.mixtures[id(work.block)]
            rows = work.stream / subject.item / subject.tokens * tokens * choices
            total += passes * rows * (subject.item + back) * (spread.ep - 1) / spread.ep
    return total
