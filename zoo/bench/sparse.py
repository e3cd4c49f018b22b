"""`zoo bench sparse`: sparse attention over a share of the causal blocks against dense causal SDPA."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from zoo.bench.cases import Case
from zoo.bench.groups import Candidate, Contest, Group, Settings, What
from zoo.bench.ops import contest, runner
from zoo.bench.peers import sdpa
from zoo.bench.problems import Draw, Problem, sparse_problem

# heads, key heads, and what the ratio to SDPA is to reach at a density: (forward, forward and backward)
CPU = (8, 8, {0.25: (2.5, 1.0)})
GPU = (32, 8, {0.25: (3.0, 3.0), 1.0: (0.7, 0.7)})
TILES = (128, 1)


def groups(settings: Settings, lengths: Sequence[int] = ()) -> Iterator[Group]:
    """Each shape and density, forward and with backward."""
    heads, kv_heads, densities = GPU if settings.device == "cuda" else CPU
    default = 32768 if settings.device == "cuda" else 8192
    for seq in lengths or (default,):
        for tile in TILES:
            for density, wanted in densities.items():
                for what, ratio in zip(("forward", "forward+backward"), wanted):
                    # what is wanted was said of this length and of blocks of 128 by 128
                    goal = ratio if tile > 1 and seq == default else None
                    yield _group(what, seq, settings, heads, kv_heads if tile > 1 else 2, tile, density, goal)


def _group(
    what: What, seq: int, settings: Settings, heads: int, kv_heads: int, tile: int, density: float, wanted: float | None
) -> Group:
    def make(draw: Draw, T: int, step: bool) -> Problem:
        draw.batch = 1
        return sparse_problem(draw, T, step, heads=heads, kv_heads=kv_heads, density=density, tile=tile)

    def build(length: int) -> Contest:
        rows = contest(Case("sparse_attention", "", make), what, length, settings)
        draw = Draw(settings.device, settings.dtype)
        call, inputs = sdpa.causal(*make(draw, length, False).inputs)
        dense = Candidate("SDPA, dense causal", "peer", runner(call, inputs, what), alike=density == 1.0)
        return Contest([*rows.candidates, dense], rows.flops, rows.moved)

    blocks = "128x128 per head" if tile > 1 else "64 keys per token"
    return Group(f"sparse_attention, {density:.0%} of blocks, {blocks}", what, seq, build, wanted=wanted,
                 facts={"density": density, "heads": heads, "kv_heads": kv_heads})  # fmt: skip
