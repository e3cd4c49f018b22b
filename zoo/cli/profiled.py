"""What `zoo profile` knows of one kind of pass, whatever it is shown as."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from zoo.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zoo.architectures.model import Model
    from zoo.contract import Mode
    from zoo.cost import CostReport
    from zoo.devices import Device
    from zoo.graph.spec import Graph
    from zoo.measure.run import Measured
    from zoo.plan.bill import Bill
    from zoo.plan.limits import Limits
    from zoo.predict.roofline import Prediction, Timing
    from zoo.sections import TrainSection

LOCAL = ("cpu", "cuda")  # devices that something can be measured on


@dataclass(frozen=True)
class Target:
    """The device that is asked about: what it can do, how long work takes on it (None: nobody knows), in which dtype.
    `notes` say where the times come from; of `local` devices passes are measured."""

    name: str
    device: Device
    timing: Timing | None
    dtype: str
    notes: tuple[str, ...] = ()

    @property
    def local(self) -> bool:
        return self.name in LOCAL


@dataclass
class Profiled:
    """A pass: its cost, what is predicted and measured of it, what fits, what a run costs."""

    report: CostReport
    limits: Limits
    prediction: Prediction | None = None
    measured: Measured | None = None
    not_measured: str = ""
    bill: Bill | None = None
    lines: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        from zoo.views.quantities import RATIO, known, totals, values

        passes = known(self.prediction, self.measured)
        ratios = {n.path: found[RATIO.key] for n in self.report.nodes if RATIO.key in (found := values(n, passes))}
        total = totals(self.report, self.prediction, self.measured).get(RATIO.key)
        return self.report.as_dict() | {
            "predicted": self.prediction and self.prediction.as_dict(),
            "limits": self.limits.as_dict(),
            "measured": self.measured and self.measured.as_dict(),
            "not_measured": self.not_measured or None,
            RATIO.key: {"total": total, "nodes": ratios} if total else None,
            "run": self.bill and self.bill.as_dict(),
            "notes": self.lines,
        }


def target(name: str, dtype: str | None) -> Target:
    """The device called `name`. ConfigError for one that does not exist."""
    from zoo import devices
    from zoo.bench import machine
    from zoo.predict import calibration
    from zoo.predict.roofline import Assumed

    if name not in LOCAL:
        device = devices.named(name)
        dtype = dtype or next((d for d in ("bfloat16", "float32") if d in device.matrix), next(iter(device.matrix)))
        device.flops(dtype)
        return Target(device.name, device, Assumed(device, dtype), dtype)
    machine.check_device(name)
    if dtype not in (None, "float32"):
        raise ConfigError(f"--dtype {dtype}: on {name} passes are measured in float32; other devices are predicted")
    found = calibration.load(name)
    if found is None and name == "cuda" and (card := devices.recognised(machine.device_name(name))):
        return Target(name, card, Assumed(card, "float32"), "float32")
    if found is None:
        notes = ("no times are predicted: `zoo calibrate` measures this device first",)
        return Target(name, devices.cpu(), None, "float32", notes)
    changes = found.environment.changes(calibration.Environment.here(name))
    notes = (f"calibrated elsewhere: {'; '.join(changes)}; `zoo calibrate` does it again",) if changes else ()
    return Target(name, found.device, found, "float32", notes)


DEFAULT_LENGTH, DEFAULT_CONTEXT = 1024, 1024


@dataclass(frozen=True)
class Asked:
    """Which passes: their mode, rows, lengths (None: that of the configuration), tokens in the state before."""

    target: Target
    mode: Mode = "train"
    rows: int = 1
    lengths: Sequence[int] | None = None
    context: int | None = None

    def passes(self, graph: Graph) -> list[Profiled]:
        """What is predicted of each."""
        from zoo.cost import estimate

        model, train = self.model(graph, self.mode), trained(graph)
        before = (DEFAULT_CONTEXT if self.mode == "decode" else 0) if self.context is None else self.context
        return [
            predicted(model, estimate(model, batch_size=self.rows, seq_len=n, context_len=before, mode=self.mode),
                      self.target, train)
            for n in self.lengths or [self._length(graph)]
        ]  # fmt: skip

    def model(self, graph: Graph, mode: Mode) -> Model:
        """The model without weights. They are trained in float32, whatever the products are in."""
        import torch

        from zoo.architectures.storage import assemble

        halves = self.target.dtype in ("bfloat16", "float16") and mode != "train"
        return assemble(graph, dtype=getattr(torch, self.target.dtype) if halves else torch.float32)

    def _length(self, graph: Graph) -> int:
        if graph.vision:
            return graph.vision.num_tokens
        return 1 if self.mode == "decode" else (graph.document.get("train") or {}).get("seq_len", DEFAULT_LENGTH)


def lengths(seq: str | None) -> list[int] | None:
    """Those that --seq names."""
    try:
        return None if seq is None else [int(part) for part in seq.split(",")]
    except ValueError:
        raise ConfigError(f"--seq {seq}: write numbers, as in 1024,8192") from None


def trained(graph: Graph) -> TrainSection:
    """How the configuration trains."""
    from zoo.sections import TrainSection

    return TrainSection.from_mapping(graph.document.get("train"))


def predicted(model: Model, report: CostReport, target: Target, train: TrainSection) -> Profiled:
    """Times and limits of a pass on the target."""
    from zoo.plan.limits import limits
    from zoo.predict.roofline import Assumed, predict

    found = Profiled(report, limits(model, report, target.device, replace(train, dtype=trained_in(target))))
    if target.timing:
        found.prediction = predict(report, target.timing)
        found.lines += found.prediction.notes
    if isinstance(target.timing, Assumed):
        found.lines.append(target.timing.words(node.block for node in report.nodes))
    found.lines += target.notes
    return found


def billed(
    graph: Graph, target: Target, seq_len: int, rows: int | None, gpus: int, tokens: str | None, price: float | None
) -> Bill:
    """A training run on `gpus` such devices; `rows` of each, or those of the configuration."""
    from zoo.architectures.storage import assemble
    from zoo.plan.bill import amount, bill, laid_out
    from zoo.plan.subject import Subject
    from zoo.sections import TrainSection

    if target.timing is None:
        raise ConfigError(f"--gpus, --tokens: {target.notes[0]}")
    train = TrainSection.from_mapping(graph.document.get("train"))
    pieces = gpus * train.accumulation
    batch = rows * pieces if rows else -(-train.batch_size // pieces) * pieces
    train = replace(train, batch_size=batch, dtype=trained_in(target))
    subject = Subject(assemble(graph), train, seq_len)
    wanted = dict(graph.document.get("parallel") or {})
    made = laid_out(subject, wanted, gpus, target.device, target.timing)
    return bill(made, subject, amount(tokens, "--tokens") if tokens else batch * seq_len, price)


def trained_in(target: Target) -> Any:
    """The dtype of `train:` nearest to that of the target."""
    return "float32" if target.dtype == "float64" else "bfloat16" if target.dtype == "float16" else target.dtype
