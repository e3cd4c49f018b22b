"""Time and memory of passes against their length and their number of rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from zoo.cost import estimate
from zoo.plan.limits import needed
from zoo.predict.roofline import predict

if TYPE_CHECKING:
    from zoo.architectures.model import Model
    from zoo.contract import Mode
    from zoo.predict.roofline import Timing
    from zoo.sections import TrainSection

TOKENS = tuple(2**n for n in range(7, 18))
ROWS = tuple(2**n for n in range(9))
PATIENCE = 1.0  # seconds of computing; a point that took longer is the last of its curve


@dataclass(frozen=True)
class Curve:
    """`along` is tokens or rows; points are x, milliseconds (None where nobody knows) and bytes."""

    mode: Mode
    along: str
    points: tuple[tuple[int, float | None, int], ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"mode": self.mode, "along": self.along, "points": [list(p) for p in self.points]}


def curves(
    model_of: Callable[[Mode], Model], rows: int, tokens: int, timing: Timing | None, train: TrainSection
) -> list[Curve]:
    """Of every kind of pass that the model can take: against tokens at `rows` rows, against rows at `tokens` tokens.
    A decoding pass makes one token after so many. Rows of images have one length."""
    found = []
    for mode in model_of("train").modes:
        model = model_of(mode)
        fixed = not hasattr(model, "vocab_size")
        # what it learns of a length serves all numbers of rows
        need = needed(model, estimate(model, batch_size=1, seq_len=1, mode=mode), train)
        along = {"tokens": () if fixed else [(rows, n) for n in TOKENS], "rows": [(n, tokens) for n in ROWS]}
        for name, places in along.items():
            points = _points(model, mode, places, timing, need)
            if points := tuple((t if name == "tokens" else r, ms, size) for r, t, ms, size in points):
                found.append(Curve(mode, name, points))
    return found


def _points(
    model: Model, mode: Mode, places: Any, timing: Timing | None, need: Callable[[int, int], int]
) -> Iterator[tuple[int, int, float | None, int]]:
    for rows, tokens in places:
        begun = time.process_time()
        new, before = (1, tokens) if mode == "decode" else (tokens, 0)
        report = estimate(model, batch_size=rows, seq_len=new, context_len=before, mode=mode)
        spent = predict(report, timing).total if timing else None
        yield rows, tokens, spent, need(rows, new + before)
        if time.process_time() - begun > PATIENCE:
            return
