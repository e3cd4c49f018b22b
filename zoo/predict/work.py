"""What of a node takes time, from its cost."""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING

from zoo.predict.kinds import is_joint

if TYPE_CHECKING:
    from zoo.cost import CostReport, NodeCost


# the root grows slower than the work: small products are slow ones
FEATURES = (
    "a call", "a useful FLOP of products", "a FLOP of other work", "a byte", "a root of FLOPs of products and of calls",
    "an expert", "an executed FLOP of products",
)  # fmt: skip


@dataclass(frozen=True)
class Work:
    """Calls of the block, one for each piece; FLOPs of products and of all else; bytes read and written. `useful`:
    FLOPs that no kernel can leave out, as one of causal attention leaves out what is masked; `groups`: experts chosen.
    Of what is read, `held` are the bytes that were there before the pass, weights and state; `span` bytes are moved
    until the next pass reads them again. Both are 0 in training, where that is always much."""

    calls: float = 0.0
    matrix: float = 0.0
    vector: float = 0.0
    traffic: float = 0.0
    useful: float = math.inf
    groups: float = 0.0
    held: float = 0.0
    span: float = 0.0

    @property
    def features(self) -> tuple[float, ...]:
        """What rates of a calibration are for, see `FEATURES`."""
        small = math.sqrt(self.matrix * max(self.calls, self.groups))
        useful = min(self.matrix, self.useful)
        return self.calls, useful, self.vector, self.traffic, small, self.groups, self.matrix


@dataclass(frozen=True)
class Around:
    """What a pass does outside its nodes, and so no node is charged with: it adds increments up, moves tokens to where
    they are routed, and in training takes the loss. `streams`: calls times bytes of the stream; bytes of logits;
    `joints`: routers, merges and other parts of combinators, and `joined`, joints times bytes of the stream."""

    passes: float
    calls: float
    streams: float
    logits: float
    joints: float
    joined: float

    @property
    def features(self) -> tuple[float, ...]:
        """What rates of a calibration are for."""
        return astuple(self)


def work_of(node: NodeCost, report: CostReport) -> Work:
    """Of a head that continues a row only the last token's logits are wanted; the gradient of an embedding's table is
    as large as the table."""
    moved = node.bytes_read + node.bytes_written
    if report.mode == "train":
        table = report.itemsize * node.params if node.path == "tok_embeddings" else 0
        return Work(node.pieces, node.flops, node.vector_flops, moved + table, node.useful_flops, node.groups)
    share, held = 1.0, node.bytes_read
    if node.path == "lm_head":
        share, held = 1 / report.seq_len, held - _stream(report)
        moved = held + share * (moved - held)
    elif report.mode == "prefill" and node is not report.nodes[0]:  # the stream is not held, a state is not there yet
        held = min(held, round(node.calls * node.params * report.itemsize))
    work = (share * node.flops, share * node.vector_flops, moved, share * node.useful_flops, node.groups)
    return Work(node.pieces, *work, held=held, span=report.bytes_read + report.bytes_written)


def _stream(report: CostReport) -> int:
    """Bytes that the embedding gives, and as many of gradients that it gets."""
    return report.nodes[0].bytes_written // (2 if report.mode == "train" else 1)


def around(report: CostReport) -> Around:
    """That of the whole pass."""
    joints = sum(is_joint(node.block) for node in report.nodes)
    calls, stream = sum(node.calls for node in report.nodes) - joints, _stream(report)
    head = report.nodes[-1]
    logits = 0.0
    if report.mode == "train" and head.path == "lm_head":  # written in three passes, and kept with what they are of
        logits = (head.bytes_written - _stream(report)) / 4
    return Around(1.0, calls, calls * stream, logits, joints, joints * stream)
