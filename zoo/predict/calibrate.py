"""Measures the device at hand: products, a copy, the smallest call, and models made of every block there is.

Models are measured as `zoo profile` measures, so that whatever a node's time has in it (hooks, autograd, caches) is in
its rates. Each has two blocks of different kinds, one after another: a block that has the caches for itself is
quicker than it will ever be. Sizes go from few tokens to about 1500 and from width 64 to 512.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from zoo import registry
from zoo.architectures.storage import build
from zoo.bench import machine
from zoo.bench.timing import Runner, sample
from zoo.cost import CostReport, estimate
from zoo.errors import ConfigError
from zoo.measure.run import Measured, measure_model
from zoo.predict.calibration import Calibration, Environment, Rates
from zoo.predict.distance import Curve, curve, seconds_a_byte
from zoo.predict.fit import rates
from zoo.predict.kinds import kind_of, plain
from zoo.predict.work import Around, Work, around, work_of

Shape = tuple[str, int, int, int]  # mode, rows, tokens, tokens before


@dataclass(frozen=True)
class Probe:
    """Models of width `dim`, with each block as it comes or with each of its examples; the passes to measure."""

    dim: int
    vocab: int
    examples: bool
    shapes: tuple[Shape, ...]


def _shapes(*sizes: tuple[int, int], decode: Sequence[tuple[int, int]]) -> tuple[Shape, ...]:
    whole = [(mode, rows, tokens, 0) for rows, tokens in sizes for mode in ("prefill", "train")]
    return (*whole, *(("decode", rows, 1, before) for rows, before in decode))


PROBES: dict[str, tuple[Probe, ...]] = {
    "cpu": (
        Probe(64, 512, False, _shapes((2, 64), (4, 384), decode=((1, 256), (4, 512)))),
        Probe(128, 1536, True, _shapes((1, 320), decode=((2, 96),))),
        Probe(128, 1536, False, _shapes((1, 192), (1, 768), decode=((1, 512), (2, 160)))),
        Probe(256, 3072, False, _shapes((1, 160), (2, 320), decode=((1, 384), (4, 256)))),
        Probe(512, 2048, False, _shapes((1, 224), decode=((1, 128),))),
    ),
    "cuda": (
        Probe(256, 4096, False, _shapes((2, 128), (4, 1024), decode=((1, 512), (16, 1024)))),
        Probe(512, 8192, False, _shapes((1, 512), (8, 1024), decode=((1, 2048), (64, 512)))),
        Probe(1024, 32768, False, _shapes((2, 512), (4, 2048), decode=((1, 1024), (32, 1024)))),
    ),
}
_ROUTER = {"expert_choice": {"capacity": [1.0, 0.5]}}
# what blocks as they come do not show: routed and merged layers, many of one kind
JOINED: tuple[Any, ...] = (
    {"repeat": 8, "of": ["swiglu"]},
    {"repeat": 3, "of": ["attention", "swiglu"]},
    {"repeat": 3, "of": ["mamba2"]},
    {"repeat": 3, "of": [{"parallel": ["swiglu", "mlp"], "merge": "gated", "norm": "rms"}]},
    {"repeat": 2, "of": [{"loop": {"steps": 2, "router": _ROUTER}, "of": ["swiglu"]}]},
)
# options on which more depends than on the width, of every probe
VARIED: tuple[Any, ...] = (
    {"moe": {"num_experts": 24, "top_k": 4, "hidden_dim": 48}},
    {"attention": {"num_heads": 4, "num_kv_heads": 2}},
)
TOGETHER = 2  # blocks in a model
EXAMPLES = 2  # of a block, at the most
ROUNDS = 2  # minutes apart, the quicker one counts: others use the machine too
ENOUGH = 0.02  # seconds for a kind of pass; three passes where one is slow
# what is measured of `distance`: layers of swiglu of a width, from those that caches hold to those that none does
LADDERS = {"cpu": (256, (1, 2, 4, 6, 8, 12, 16, 24)), "cuda": (512, (1, 2, 4, 6, 8, 12, 16))}
STEPS: tuple[Shape, ...] = (("decode", 1, 1, 32), ("prefill", 1, 32, 0))
WIDTHS = {"cpu": (64, 128, 256, 512, 1024), "cuda": (256, 1024, 4096, 8192)}


@dataclass(frozen=True)
class Sample:
    """A measured node, or what lay around the nodes of a pass (`block` empty)."""

    block: str
    mode: str
    work: Work | Around
    seconds: float


def calibrate(
    device: str,
    probes: Sequence[Probe],
    widths: Sequence[int],
    advance: Callable[[str, int], Any] = lambda what, left: None,
    now: Callable[[], float] = time.perf_counter,
) -> Calibration:
    """Measure `probes` on `device` and fit rates to them. `now` tells seconds; `advance` is told what comes next, and
    how many more steps there are."""
    models = [(probe, trunk) for probe in probes for trunk in trunks(probe)]
    left = 2 + ROUNDS * len(models)
    advance("products and copies", left)
    with torch.no_grad():
        products = {n: _product(device, n) for n in widths}
        bandwidth = machine.peaks(device, torch.float32, width=max(widths), rounds=3).copy
        one = torch.ones(1, device=device)
        launch = 1e-3 * statistics.median(sample(Runner(lambda: one + one), device, 1000) for _ in range(5))
    calm = machine.Calm(tries=len(models))
    advance("weights far away", left - 1)
    distance = _distance(device, calm, now)
    rounds: list[list[Sample]] = []
    left -= 2
    for _ in range(ROUNDS):
        rounds.append([])
        for probe, trunk in models:
            advance(f"width {probe.dim}: {', '.join(next(iter(node)) for node in trunk)}", left)
            rounds[-1] += calm(lambda: list(_probe(probe, trunk, device, now)))  # noqa: B023
            left -= 1
    samples = [min(same, key=lambda s: s.seconds) for same in zip(*rounds, strict=True)]
    blocks, rest, error = fit(samples, max(products.values()), distance)
    return Calibration(
        Environment.here(device), products, bandwidth, launch, blocks, rest, distance, reached(samples), error
    )


def _product(device: str, n: int) -> float:
    a, b = (torch.randn(n, n, device=device) for _ in range(2))
    run = Runner(lambda: machine.linear(a, b))
    sample(run, device)
    return 2e3 * n**3 / min(sample(run, device, 3) for _ in range(5))


def _distance(device: str, calm: machine.Calm, now: Callable[[], float]) -> dict[str, Curve]:
    """By mode. The middle layer of a pass counts, the quicker pass of `ROUNDS`."""
    dim, depths = LADDERS[device]
    found: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
    held = 0.0
    for depth in depths:
        model = build(_document(Probe(dim, 64, False, STEPS), [{"repeat": depth, "of": ["swiglu"]}]), device=device)
        for shape in STEPS:
            report = _report(model, shape)
            layers = {n.path: work_of(n, report) for n in report.nodes if n.block == "swiglu"}
            measure = partial(measure_model, model, report, device, ENOUGH, now)
            passes = [calm(measure).nodes for _ in range(ROUNDS)]
            middle = min(statistics.median(spent[path] for path in layers) for spent in passes)
            work = next(iter(layers.values()))
            found[report.mode].append((work.span, 1e-3 * middle))
            held = work.held
    return {mode: curve(points, held) for mode, points in found.items()}


def _probe(probe: Probe, trunk: list[Any], device: str, now: Callable[[], float]) -> Iterator[Sample]:
    model = build(_document(probe, trunk), device=device)
    for shape in probe.shapes:
        report = _report(model, shape)
        yield from samples_of(report, measure_model(model, report, device, ENOUGH, now))


def _report(model: Any, shape: Shape) -> CostReport:
    mode, rows, tokens, before = shape
    return estimate(model, batch_size=rows, seq_len=tokens, context_len=before, mode=mode)  # type: ignore[arg-type]


def samples_of(report: CostReport, measured: Measured) -> Iterator[Sample]:
    """What a measured pass says about its nodes, of equal ones the middle, and about what lies around them."""
    equal: defaultdict[tuple[str, Work], list[float]] = defaultdict(list)
    for node in report.nodes:
        if node.path in measured.nodes:
            equal[plain(node.block), work_of(node, report)].append(measured.nodes[node.path])
    for (block, work), spent in equal.items():
        yield Sample(block, report.mode, work, 1e-3 * max(statistics.median(spent), 1e-4))
    rest = measured.total - sum(measured.nodes.values())
    yield Sample("", report.mode, around(report), 1e-3 * max(rest, 0.01 * measured.total))


def fit(
    samples: Sequence[Sample], peak: float, distance: Mapping[str, Curve]
) -> tuple[dict[tuple[str, str], Rates], dict[str, Rates], float]:
    """Rates by block and mode, of the rest by mode, and the median relative error of the nodes' times. No product is
    done in more than `peak` FLOP/s: the sizes alone do not always tell products from what grows with them."""
    together: defaultdict[tuple[str, str], list[tuple[tuple[float, ...], float]]] = defaultdict(list)
    for s in samples:
        together[s.block, s.mode].append((s.work.features, _nearby(s, distance)))
    found: dict[tuple[str, str], Rates] = {}
    errors: list[float] = []
    for (block, mode), of in together.items():
        least = (0, 1 / peak, 0, 0, 0, 0, 0) if block else ()
        found[block, mode] = rates([f for f, _ in of], [spent for _, spent in of], least)
        if block:
            errors += [
                abs(sum(r * x for r, x in zip(found[block, mode], f, strict=True)) / spent - 1) for f, spent in of
            ]
    rest = {mode: found.pop((block, mode)) for block, mode in list(found) if not block}
    return found, rest, statistics.median(errors)


def _nearby(s: Sample, distance: Mapping[str, Curve]) -> float:
    """Seconds that it would have taken with its weights at hand; a third at the least, since they cost no more."""
    if isinstance(s.work, Around):
        return s.seconds
    waited = s.work.held * seconds_a_byte(distance.get(s.mode, ()), s.work.span)
    return max(s.seconds - waited, s.seconds / 3)


def reached(samples: Sequence[Sample]) -> dict[str, dict[str, tuple[float, float]]]:
    """FLOP/s of products that nodes of each kind of work reached, by mode: the middle one and the best."""
    found: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for s in samples:
        if isinstance(s.work, Work) and s.work.matrix:
            found[kind_of(s.block), s.mode].append(s.work.matrix / s.seconds)
    kinds: dict[str, dict[str, tuple[float, float]]] = {}
    for (kind, mode), speeds in found.items():
        kinds.setdefault(kind, {})[mode] = (statistics.median(speeds), max(speeds))
    return kinds


# ---------------------------------------------------------------------------------------------- models
def trunks(probe: Probe) -> list[list[Any]]:
    """Of the models of a probe. Neighbours in the list of blocks are relatives: they get models of their own."""
    nodes = [*usable(probe), *VARIED]
    count = -(-len(nodes) // TOGETHER)
    return [*([node] for node in JOINED), *(nodes[i::count] for i in range(count))]


def usable(probe: Probe) -> list[Any]:
    """Blocks that can stand in a causal model of this width, with options of their own where examples are wanted."""
    found = []
    for kind in ("mixer", "ffn", "memory"):
        for name in registry.list_blocks(kind):
            examples = registry.block_card(name).examples[:EXAMPLES] if probe.examples else ({},)
            found += [{name: dict(options)} for options in examples if _builds(probe, {name: dict(options)})]
    return found


def _builds(probe: Probe, node: Any) -> bool:
    try:
        model = build(_document(probe, [node]), device="meta")
        for shape in probe.shapes:
            _report(model, shape)
        return True
    except (ConfigError, ValueError, NotImplementedError):
        return False


def _document(probe: Probe, trunk: list[Any]) -> dict[str, Any]:
    return {
        "name": "calibration", "architecture": "causal_lm", "dim": probe.dim, "vocab_size": probe.vocab,
        "trunk": trunk,
    }  # fmt: skip
