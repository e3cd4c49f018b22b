"""What a call costs, in what units: the record that every block and every part of a graph fills in."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from torch import nn

Mode = Literal["train", "prefill", "decode"]


@dataclass(frozen=True)
class Cost:
    """What one call costs: forward for prefill and decode, forward and backward for train, which is taken as three
    forwards in all work (for every product of the forward, backward has two; elementwise work is like it).

    `flops`: executed matrix work, one multiply-add = 2: what torch's counter sees of a run on a CPU, masked scores and
    padding included. `useful_flops`: the same of what the mathematics needs, however it is run: causal pairs (a query
    at place i sees i + 1 keys), pairs inside a window, the keys that a selection chooses and the scores that it chooses
    by, experts as chosen. A recurrence with a matrix state counts token by token, as the papers write it: each
    product of the state with a vector and each rank-one update is 2 Dk Dv, whatever the chunked form executes.
    `vector_flops`: useful work that is no matrix product: every elementwise result = 1, a transcendental function
    and a division too; a reduction of n numbers = n; so softmax = 5 a score, RMSNorm = 4 and LayerNorm = 7 a number,
    sigmoid = 1, SiLU and GELU = 2, a rotated number = 3, depthwise taps and the updates of a diagonal recurrence =
    2 a multiply-add, the decay of a matrix state = 1 a number. Tables (angles), indices, sorting and copies count 0.

    `active_params` are the parameters one token touches; bytes are those of an ideal kernel that reads its
    weights, inputs and state once and writes what it adds to the state. Kept for backward (0 outside train) are
    `activation_bytes`, of which `product_bytes` are results of matrix products, attention and scans: what selective
    checkpointing keeps, where full checkpointing keeps a layer's input alone.

    `calls`: how often the block is called, in loops more than once, less than once where a share of decoded tokens
    takes it; `pieces`: into how many pieces of rows these calls cut their work, one after another; `groups`: how many
    experts they are expected to choose, whose products are apart."""

    params: int = 0
    active_params: int = 0
    flops: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    activation_bytes: int = 0
    state_bytes: int = 0
    useful_flops: int = 0
    vector_flops: int = 0
    product_bytes: int = 0
    calls: float = 0
    pieces: float = 0
    groups: float = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def of_share(self, share: float) -> Cost:
        """The work of a share of the calls; what is held stays."""
        names = ("flops", "useful_flops", "vector_flops", "bytes_read", "bytes_written")
        work = {name: round(share * getattr(self, name)) for name in names}
        return self.replace(**work, **{name: share * getattr(self, name) for name in ("calls", "pieces", "groups")})

    def replace(self, **changes: float) -> Cost:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


def part_cost(
    mode: Mode,
    itemsize: int,
    *,
    params: int = 0,
    flops: int = 0,
    vector: int = 0,
    read: int = 0,
    written: int = 0,
    kept: int = 0,
    state_bytes: int = 0,
    passes: int = 3,
) -> Cost:
    """Cost of what is no block: a norm, a merge, a router, a head. All is of one forward; read, written and kept are
    numbers beside the parameters; `passes`: forwards that a training step is worth."""
    train = mode == "train"
    passes, kept = passes if train else 1, kept * itemsize * train
    return Cost(
        params=params,
        active_params=params,
        flops=passes * flops,
        bytes_read=passes * (params + read) * itemsize + kept,
        bytes_written=passes * written * itemsize + kept,
        activation_bytes=kept,
        state_bytes=0 if train else state_bytes,
        useful_flops=passes * flops,
        vector_flops=passes * vector,
    )


def linear_flops(tokens: int, *layers: nn.Linear | None) -> int:
    """Matrix FLOPs of applying each linear layer to `tokens` rows."""
    return sum(2 * tokens * m.in_features * m.out_features for m in layers if m is not None)
