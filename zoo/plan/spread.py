"""A layout with every number filled in."""

from __future__ import annotations

from dataclasses import dataclass

from zoo.parallel.layout import pieces
from zoo.parallel.pipeline import stages_per_rank
from zoo.sections import ParallelSection, TrainSection


@dataclass(frozen=True)
class Spread:
    """Ranks along each axis, and what a rank computes at once: `rows` rows of a microbatch."""

    dp_replicate: int
    dp_shard: int
    cp: int
    tp: int
    pp: int
    ep: int
    schedule: str
    rows: int
    microbatches: int
    accumulation: int

    @property
    def ranks(self) -> int:
        return self.dp_replicate * self.fsdp * self.tp * self.pp

    @property
    def fsdp(self) -> int:
        """Ranks over which FSDP cuts weights: those with different tokens, or with other parts of the same rows."""
        return self.dp_shard * self.cp

    @property
    def stages(self) -> int:
        """Stages that a rank holds."""
        return stages_per_rank(self.schedule) if self.pp > 1 else 1

    def in_flight(self, rank: int) -> int:
        """Microbatches whose activations the pipeline's rank `rank` holds at once, one for each stage it has."""
        if self.pp == 1:
            return 1
        if self.schedule == "GPipe":
            return self.microbatches
        if self.stages == 1:
            return min(self.microbatches, self.pp - rank)
        ahead = (self.stages - 1) * self.pp + 2 * (self.pp - 1 - rank) + 1
        return min(ahead, self.stages * self.microbatches)

    def __str__(self) -> str:
        axes = {n: getattr(self, n) for n in ("dp_replicate", "dp_shard", "tp", "pp", "cp", "ep")}
        words = [f"{name} {n}" for name, n in axes.items() if n > 1] or ["one process"]
        return ", ".join(words) + (f", {self.schedule}" if self.pp > 1 else "")


def resolve(layout: ParallelSection, train: TrainSection, ranks: int) -> Spread:
    """`layout` on `ranks` processes. ConfigError where the numbers do not go together, as in training."""
    made = pieces(layout, train, ranks)
    return Spread(
        layout.dp_replicate, made.shard, layout.cp, layout.tp, layout.pp, layout.ep, layout.schedule,
        made.rows // made.microbatches, made.microbatches, train.accumulation,
    )  # fmt: skip
