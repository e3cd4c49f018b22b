"""Predicted time of every node: from rates that `zoo calibrate` measured, or as a roofline with stated assumptions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

from zoo.devices import Device
from zoo.predict.kinds import kind_of, plain
from zoo.predict.work import Around, Work, around, work_of

if TYPE_CHECKING:
    from zoo.cost import CostReport


class Timing(Protocol):
    """Seconds of work on a device: a `Calibration`, or `Assumed`."""

    calibrated: bool

    def seconds(self, block: str, mode: str, work: Work) -> float: ...
    def rest_seconds(self, mode: str, around: Around) -> float: ...
    def note(self, block: str) -> str: ...


@dataclass(frozen=True)
class Share:
    """Of a kind of work: the share of the peak that its products reach, and the launches of a forward."""

    products: float
    launches: int


# what good kernels reach in 16 bits on recent cards; not measured here
SHARES: Mapping[str, Share] = {
    "linear": Share(0.65, 8),
    "attention": Share(0.5, 14),
    "sparse attention": Share(0.3, 30),
    "grouped products": Share(0.5, 20),
    "linear attention": Share(0.35, 20),
    "delta rule": Share(0.25, 24),
    "scan": Share(0.5, 16),
    "convolution": Share(0.45, 20),
    "lookup": Share(0.3, 16),
    "elementwise": Share(0.5, 4),
}
BANDWIDTH = 0.8  # share of the peak
VECTOR_BYTES = 2  # that an operation outside products moves: four of them fused, 16 bits in and out
AROUND_LAUNCHES = 2  # of a node: its residual sum


@dataclass(frozen=True)
class Assumed:
    """A device that was not measured: products and traffic beside each other, then other work, then launches."""

    device: Device
    dtype: str

    calibrated = False

    def seconds(self, block: str, mode: str, work: Work) -> float:
        """Of one node."""
        share = SHARES[kind_of(block)]
        products = work.matrix / (share.products * self.device.flops(self.dtype))
        return max(products, self._moving(work.traffic)) + self._other(work.vector) + self._launching(
            mode, share.launches * work.calls
        )  # fmt: skip

    def rest_seconds(self, mode: str, around: Around) -> float:
        """Two passes over the stream for a sum, three over the logits for a loss; twice that more with backward."""
        moved = (3 if mode == "train" else 1) * (2 * around.streams + 3 * around.logits)
        return self._moving(moved) + self._launching(mode, AROUND_LAUNCHES * around.calls)

    def note(self, block: str) -> str:
        return ""

    def _moving(self, amount: float) -> float:
        return amount / (BANDWIDTH * self.device.bandwidth)

    def _other(self, work: float) -> float:
        bytes_each = VECTOR_BYTES * (2 if self.dtype in ("float32", "float64") else 1)
        return max(work / self.device.vector, self._moving(bytes_each * work))

    def _launching(self, mode: str, launches: float) -> float:
        return self.device.launch * launches * (3 if mode == "train" else 1)

    def words(self, blocks: Iterable[str]) -> str:
        """What is taken for granted of a model of these blocks."""
        d, kinds = self.device, dict.fromkeys(map(kind_of, blocks))
        shares = ", ".join(f"{100 * SHARES[k].products:.0f}% in {k}" for k in kinds if k != "elementwise")
        return (
            f"not calibrated: {d.name} is taken to reach of {d.flops(self.dtype) / 1e12:.3g} TFLOP/s in {self.dtype} "
            f"{shares or 'all'}; {100 * BANDWIDTH:.0f}% of {d.bandwidth / 1e9:.0f} GB/s; "
            f"{1e6 * d.launch:.0f} us a launch"
        )


@dataclass(frozen=True)
class Prediction:
    """Milliseconds of one pass: of each node by its path, of what lies around them, together."""

    total: float
    nodes: Mapping[str, float]
    rest: float
    calibrated: bool
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def predict(report: CostReport, timing: Timing) -> Prediction:
    """Of every node of `report`."""
    nodes: dict[str, float] = {}
    for node in report.nodes:
        spent = 1e3 * timing.seconds(plain(node.block), report.mode, work_of(node, report))
        nodes[node.path] = nodes.get(node.path, 0.0) + spent
    rest = 1e3 * timing.rest_seconds(report.mode, around(report))
    notes = dict.fromkeys(note for n in report.nodes if (note := timing.note(plain(n.block))))
    return Prediction(sum(nodes.values()) + rest, nodes, rest, timing.calibrated, tuple(notes))
