"""Memory, traffic and time of one step of a layout, from the blocks' own costs and plans; nothing is run.

Memory is what FSDP, tensor and pipeline parallelism of this package hold: weights, gradients and optimizer state in
the weights' dtype; gathered weights; what autograd keeps, by the cost model (for the kernels of the CPU); logits.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

from zoo.devices import USABLE, Device
from zoo.plan.spread import Spread
from zoo.plan.subject import Held, Subject, Work
from zoo.plan.traffic import Move, moves
from zoo.predict.roofline import Timing
from zoo.predict.work import Around

OVERLAPPED = ("gather weights", "reduce gradients", "sum over copies")  # run beside the computation


@dataclass(frozen=True)
class Rank:
    """What a rank of one pipeline stage (of all, where there is one) holds, sends and computes in a step. Bytes; `peak`
    is less than the sum, because gradients come while activations go."""

    layers: str
    parameters: int
    weights: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    loss: int
    peak: int
    flops: float
    seconds: float
    moves: tuple[Move, ...]


@dataclass(frozen=True)
class Plan:
    """A layout on a machine. Seconds are of one optimizer step of the slowest rank: computation as predicted, beside
    which weights travel (`hidden`); what computation waits for (`exposed`); idle time of the pipeline. `mfu`: share of
    the peak that the step's FLOPs, without recomputation, are of all ranks."""

    spread: Spread
    device: Device
    ranks: tuple[Rank, ...]
    compute: float
    hidden: float
    exposed: float
    idle: float
    mfu: float

    @property
    def peak(self) -> int:
        return max(rank.peak for rank in self.ranks)

    @property
    def fits(self) -> bool:
        return self.peak <= USABLE * self.device.memory

    @property
    def seconds(self) -> float:
        return max(self.compute, self.hidden) + self.exposed + self.idle

    @property
    def traffic(self) -> dict[str, Move]:
        """Of each kind the move that takes longest on any rank."""
        found: dict[str, Move] = {}
        for move in (m for rank in self.ranks for m in rank.moves):
            if move.kind not in found or move.bytes > found[move.kind].bytes:
                found[move.kind] = move
        return found

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        own = {n: getattr(self, n) for n in ("compute", "hidden", "exposed", "idle", "seconds")}
        return {
            "layout": dataclasses.asdict(self.spread) | {"ranks": self.spread.ranks},
            "gpu": self.device.as_dict(),
            "fits": self.fits,
            "peak": self.peak,
            "mfu": self.mfu,
            "seconds": own,
            "stages": [dataclasses.asdict(rank) for rank in self.ranks],
        }


def plan(subject: Subject, spread: Spread, device: Device, timing: Timing) -> Plan:
    """What `spread` makes of `subject` on `device`, whose work takes as long as `timing` says."""
    units = subject.stage_units(spread.pp, spread.stages)
    ranks = tuple(_rank(subject, spread, device, timing, r, units[r :: spread.pp]) for r in range(spread.pp))
    compute = max(rank.seconds for rank in ranks)
    hidden = max(sum(m.seconds for m in rank.moves if m.kind in OVERLAPPED) for rank in ranks)
    exposed = max(sum(m.seconds for m in rank.moves if m.kind not in OVERLAPPED) for rank in ranks)
    idle = (spread.pp - 1) / (spread.microbatches * spread.stages) * (compute + exposed)
    work = sum(w.flops for unit in subject.work for w in unit) * subject.train.batch_size
    peak = spread.ranks * device.flops(subject.train.dtype)
    mfu = work / peak / (max(compute, hidden) + exposed + idle)
    return Plan(spread, device, ranks, compute, hidden, exposed, idle, mfu)


def _rank(
    subject: Subject, spread: Spread, device: Device, timing: Timing, number: int, stages: list[list[int]]
) -> Rank:
    units = [u for stage in stages for u in stage]
    every = subject.held(spread.tp, spread.fsdp, spread.ep)
    held = {u: every[u] for u in units}
    total = sum(held.values(), Held())
    kept = {u: kept_bytes(subject.piece, spread, u) for u in units}
    # a schedule that goes round has several stages, of each of which it holds its part of the microbatches in flight
    flying = spread.in_flight(number) / len(stages)
    handed = subject.handed_on(spread.rows)
    memory = _Memory(subject.piece, spread, units, held, kept, flying, subject.chunks > 1)
    buffers = sum(subject.buffers[u] for u in units)
    layers = [u - 1 for u in units if 1 <= u <= subject.num_layers]
    return Rank(
        layers=", ".join(_span(stage, subject.num_layers) for stage in stages) if layers else "",
        parameters=total.elements,
        weights=total.weights + buffers,
        gradients=total.gradients,
        optimizer=total.optimizer,
        gathered=memory.gathered_at_most,
        activations=int(flying * memory.activations) + handed,
        loss=memory.loss,
        peak=int(total.weights + buffers + total.optimizer + handed + memory.peak()),
        flops=sum(_flops(subject, spread, u) for u in units),
        seconds=sum(_seconds(subject, spread, timing, u) for u in units),
        moves=tuple(moves(subject, spread, device, number, stages)),
    )


def _span(stage: list[int], num_layers: int) -> str:
    layers = [u - 1 for u in stage if 1 <= u <= num_layers]
    return f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else str(layers[0])


# ----------------------------------------------------------------------------------------------- work
def _flops(subject: Subject, spread: Spread, unit: int) -> float:
    """Of one rank in a step."""
    pieces = spread.rows * spread.microbatches * spread.accumulation
    return _row(subject, unit, spread.tp, spread.cp)[0] * pieces * subject.passes(unit) / 3


def _seconds(subject: Subject, spread: Spread, timing: Timing, unit: int) -> float:
    """Of one rank in a step: each microbatch launches everything anew."""
    total = 0.0
    stream = spread.rows * subject.tokens * subject.model.dim * subject.item
    for work in subject.work[unit]:
        parts, rows = _cut(subject, unit, work, spread.tp, spread.cp)
        total += timing.seconds(work.name, "train", work.of(spread.rows / rows, parts))
        logits = work.logits * spread.rows / rows / parts
        total += timing.rest_seconds("train", Around(0, work.runs, work.runs * stream / rows, logits, 0, 0))
    return total * spread.microbatches * spread.accumulation * subject.passes(unit) / 3


def kept_bytes(subject: Subject, spread: Spread, unit: int) -> int:
    """What autograd keeps of a unit for one microbatch, without the loss."""
    return int(spread.rows * _row(subject, unit, spread.tp, spread.cp)[1])


@functools.lru_cache(maxsize=1 << 14)
def _row(subject: Subject, unit: int, tp: int, cp: int) -> tuple[float, float, float]:
    """FLOPs of a unit on a rank for one row, bytes kept, and of these results of products."""
    flops = kept = products = 0.0
    for work in subject.work[unit]:
        parts, rows = _cut(subject, unit, work, tp, cp)
        inside, outside = work.kept - work.outside, work.outside
        if _is_head(subject, unit):  # the logits count as loss
            inside, outside = 0, work.kept - subject.item * subject.scored * subject.vocab_size
        flops += work.flops / parts / rows
        kept += (inside / parts + outside) / rows
        products += work.products / parts / rows
    if cp > 1:  # keys and values of the other slices
        for at, exchange, calls in subject.exchanges:
            if at == unit and exchange.kind == "kv":
                kept += calls * exchange.bytes_per_token * subject.seq_len * (cp - 1) / cp
    return flops, kept, min(products, kept)


def _cut(subject: Subject, unit: int, work: Work, tp: int, cp: int) -> tuple[int, int]:
    """Into how many parts tensor and context parallelism cut the work."""
    parts = tp if tp > 1 and _is_split(subject, tp, unit, work.block) else 1
    # blocks that look at the row in their own way compute all of it on every rank
    return parts, 1 if cp > 1 and id(work.block) in subject.on_whole_rows else cp


def _is_split(subject: Subject, tp: int, unit: int, block: Any) -> bool:
    if block is None:
        return subject.names[unit] in ("tok_embeddings", "lm_head")
    return not subject.splits(tp)[id(block)].reason


def _is_head(subject: Subject, unit: int) -> bool:
    return unit == subject.head


def _casts(subject: Subject, held: Held) -> int:
    """Copies in bfloat16 of weights that are multiplied: autograd keeps them."""
    return 2 * held.matrices if subject.train.dtype == "bfloat16" else 0


class _Memory:
    """Backward of the last microbatch in flight, unit by unit from the last one."""

    def __init__(
        self, subject: Subject, spread: Spread, units: list[int], held: Any, kept: Any, flying: float, in_chunks: bool
    ):
        self.subject, self.spread, self.units, self.held = subject, spread, units, held
        self.flying, self.in_chunks = flying, in_chunks
        self.full = {u: kept[u] + _casts(subject, held[u]) for u in units}
        stream = spread.rows * subject.tokens // spread.cp * subject.model.dim * subject.item
        self.kept = dict(self.full)
        for u in units:
            if u in subject.recomputed:
                self.kept[u] = stream
            elif subject.train.activation_checkpoint == "selective" and 1 <= u <= subject.num_layers:
                products = spread.rows * _row(subject, u, spread.tp, spread.cp)[2]
                self.kept[u] = min(self.full[u], int(stream + products))
        self.activations = sum(self.kept.values())
        sizes = {u: h.gathered + h.experts for u, h in held.items()}
        self.whole = sum(sizes.values())
        self.groups: list[tuple[list[int], int, bool]] = []
        if spread.pp == 1:
            self.groups = [(g, sum(sizes[u] for u in g), subject.head in g) for g in subject.fsdp_groups]
        self.loss = self._loss()

    def _loss(self) -> int:
        """Logits, their log-softmax and the gradient of one, as many of them as exist at once."""
        subject, spread = self.subject, self.spread
        if not any(_is_head(subject, u) for u in self.units) or not subject.vocab_size:
            return 0
        chunks = subject.loss_chunks(spread.rows, spread.cp, spread.pp)
        logits = -(-spread.rows * subject.scored // spread.cp // chunks) * subject.vocab_size
        return logits * (3 * subject.item + (2 if subject.train.dtype == "bfloat16" else 0))

    def gathered(self, unit: int) -> int:
        """Weights that FSDP has gathered while backward is at a unit, with the next ones, and their own gradients."""
        if self.spread.ranks == 1:
            return 0
        if self.spread.pp > 1:  # they stay until the last microbatch, and so do gradients
            return 2 * self.whole
        total = 0
        for group, size, head in self.groups:
            stays = head and unit >= self.subject.num_layers
            if group[0] <= unit <= group[-1]:
                total += 2 * size
            elif stays or group[0] <= unit - 1 <= group[-1]:
                total += size
        return total

    @property
    def gathered_at_most(self) -> int:
        return max(map(self.gathered, self.units))

    def peak(self) -> float:
        """Beside weights and optimizer state."""
        # gradients of earlier pieces are there
        everything = self.spread.accumulation > 1 or self.spread.pp > 1 or self.in_chunks
        gradients = sum(h.gradients for h in self.held.values()) if everything else 0
        left, most, loss = self.flying * self.activations, 0.0, self.loss
        for unit in reversed(self.units):
            # what a layer computes again is there while backward is in it; its input is counted as kept
            again = self.full[unit] if unit in self.subject.recomputed else self.full[unit] - self.kept[unit]
            most = max(most, left + gradients + self.gathered(unit) + again + loss)
            left -= self.kept[unit]
            if not everything:
                gradients += self.held[unit].gradients
            loss = 0 if _is_head(self.subject, unit) else loss
        return max(most, gradients)
