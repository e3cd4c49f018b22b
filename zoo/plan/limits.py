"""The largest batch and the longest context that fit into the memory of a device."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from zoo.cost import CostReport, estimate
from zoo.devices import USABLE, Device
from zoo.plan.plan import plan
from zoo.plan.spread import Spread
from zoo.plan.subject import Subject
from zoo.predict.roofline import Assumed
from zoo.sections import TrainSection

if TYPE_CHECKING:
    from zoo.architectures.model import Model

MOST = 1 << 24  # nobody asks for more rows or tokens
_CLOSE = 64  # an answer is right to one part of this


@dataclass(frozen=True)
class Limits:
    """Bytes needed for what was asked and bytes there are; the largest `batch` of such rows, the longest `context` of
    so many rows (in training the longest row). 0: not even one; None: more than `MOST`, or a state of fixed size."""

    need: int
    memory: int
    batch: int | None
    context: int | None

    @property
    def fits(self) -> bool:
        return self.need <= self.memory

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self) | {"fits": self.fits}


def limits(model: Model, report: CostReport, device: Device, train: TrainSection) -> Limits:
    """Of the kind of pass that `report` describes, on one device. Rows of images have one length."""
    rows, tokens = report.batch_size, report.context_len + report.seq_len
    need = needed(model, report, train)
    memory = int(USABLE * device.memory)
    fixed = not hasattr(model, "vocab_size")  # images
    return Limits(
        need(rows, tokens),
        memory,
        largest(lambda n: need(n, tokens), memory, rows),
        None if fixed else largest(lambda n: need(rows, n), memory, tokens),
    )


def needed(model: Model, report: CostReport, train: TrainSection) -> Callable[[int, int], int]:
    """Bytes of memory that such a pass takes, of its rows and of all tokens of a row."""
    return _training(model, train) if report.mode == "train" else _streaming(model, report)


def _training(model: Model, train: TrainSection) -> Callable[[int, int], int]:
    """As `zoo plan` counts it for one process."""
    device = Device("any", 1.0, 1.0, {train.dtype: 1.0}, 1.0, 1.0, 1.0)
    subject = functools.lru_cache(lambda tokens: Subject(model, train, tokens))

    def need(rows: int, tokens: int) -> int:
        spread = Spread(1, 1, 1, 1, 1, 1, "1F1B", rows, 1, train.accumulation)
        return plan(subject(tokens), spread, device, Assumed(device, train.dtype)).peak

    return need


def _streaming(model: Model, report: CostReport) -> Callable[[int, int], int]:
    """Weights, the state of all tokens, and what the largest node of a pass reads and writes beside them."""

    @functools.lru_cache
    def need(rows: int, tokens: int) -> int:
        new = report.seq_len if report.mode == "decode" else tokens
        new = min(new, tokens)
        at = estimate(model, batch_size=rows, seq_len=new, context_len=tokens - new, mode=report.mode)
        item = next(model.parameters()).element_size()  # type: ignore[union-attr]
        beside = max(
            (n.bytes_read + n.bytes_written) / max(1, n.calls)  # one call after another
            - min(n.params * item, n.bytes_read / max(1, n.calls))
            - 2 * n.state_bytes
            for n in at.nodes
            if n.path != "lm_head"  # of which the last token's logits are wanted
        )
        return at.params * item + at.state_bytes + max(0, int(beside))

    return need


def largest(need: Callable[[int], int], memory: int, start: int) -> int | None:
    """The largest n that needs at most `memory`, to within 2 %; None where `MOST` does not fill it. `need` grows with
    n, mostly in proportion, so that a straight line through two points is a good guess."""
    low, high, at = 0, 0, max(start, 1)  # low fits, high does not
    known: dict[int, int] = {}
    while not high or high - low > max(1, low // _CLOSE):
        known[at] = need(at)
        if known[at] <= memory:
            if at >= MOST:
                return None
            low = at
        else:
            high = at
        at = _guess(known, low, high, memory)
    return low


def _guess(known: dict[int, int], low: int, high: int, memory: int) -> int:
    """Where to look next, inside (low, high) if both are known."""
    ends = sorted(known, key=lambda n: abs(known[n] - memory))[:2]
    guess = 8 * low if low else high // 8
    if len(ends) == 2 and known[ends[0]] != known[ends[1]]:
        slope = (known[ends[0]] - known[ends[1]]) / (ends[0] - ends[1])
        guess = int(ends[0] + (memory - known[ends[0]]) / slope)
    if high and low:
        edge = max(1, (high - low) // 16)  # always come nearer from both sides
        return min(max(guess, low + edge), high - edge)
    if high:
        return min(max(guess, 1), high // 2) if high > 1 else 1
    return min(max(guess + guess // _CLOSE, 2 * low), 64 * low, MOST)
