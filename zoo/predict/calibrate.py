"""Measures the device at hand: products, a copy, the smallest call, and models made of every block there is.

A model has one block, and is measured as `zoo profile` measures, so that whatever a node's time has in it (hooks,
autograd, caches) is in its rates. Sizes go from few tokens to about 1500 and from width 64 to 256.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
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
from zoo.predict.fit import rates
from zoo.predict.kinds import kind_of, plain
from zoo.predict.work import around, work_of

Shape = tuple[str, int, int, int]  # mode, rows, tokens, tokens before


@dataclass(frozen=True)
class Probe:
    """Models of width `dim`, one for each block as it comes or for each of its examples; the passes to measure."""

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
        Probe(64, 512, True, _shapes((2, 224), decode=((1, 192),))),
        Probe(128, 1536, False, _shapes((1, 192), (1, 768), decode=((1, 512), (2, 160)))),
        Probe(256, 3072, False, _shapes((1, 160), (2, 320), decode=((1, 384), (4, 256)))),
    ),
    "cuda": (
        Probe(256, 4096, False, _shapes((2, 128), (4, 1024), decode=((1, 512), (16, 1024)))),
        Probe(512, 8192, False, _shapes((1, 512), (8, 1024), decode=((1, 2048), (64, 512)))),
        Probe(1024, 32768, False, _shapes((2, 512), (4, 2048), decode=((1, 1024), (32, 1024)))),
    ),
}
_ROUTER = {"expert_choice": {"capacity": [1.0, 0.5]}}
# models of several layers, routed and merged: what lies around nodes is fitted to these
JOINED: tuple[Any, ...] = (
    {"repeat": 8, "of": ["swiglu"]},
    {"repeat": 3, "of": ["attention", "swiglu"]},
    {"repeat": 3, "of": ["mamba2"]},
    {"repeat": 3, "of": [{"parallel": ["swiglu", "mlp"], "merge": "gated", "norm": "rms"}]},
    {"repeat": 2, "of": [{"loop": {"steps": 2, "router": _ROUTER}, "of": ["swiglu"]}]},
)
EXAMPLES = 2  # of a block, at the most
ROUNDS = 2  # minutes apart, the quicker one counts: others use the machine too
ENOUGH = 0.02  # seconds for a kind of pass; three passes where one is slow
WIDTHS = {"cpu": (64, 128, 256, 512, 1024), "cuda": (256, 1024, 4096, 8192)}


@dataclass(frozen=True)
class Sample:
    """A measured node, or what lay around the nodes of a pass (`block` empty)."""

    block: str
    mode: str
    features: tuple[float, ...]
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
    models = [(probe, node) for probe in probes for node in (*JOINED, *usable(probe))]
    left = 1 + ROUNDS * len(models)
    advance("products and copies", left)
    with torch.no_grad():
        products = {n: _product(device, n) for n in widths}
        bandwidth = machine.peaks(device, torch.float32, width=max(widths), rounds=3).copy
        one = torch.ones(1, device=device)
        launch = 1e-3 * statistics.median(sample(Runner(lambda: one + one), device, 1000) for _ in range(5))
    rounds: list[list[Sample]] = []
    calm = machine.Calm(tries=len(models) // 2)
    for _ in range(ROUNDS):
        rounds.append([])
        for probe, node in models:
            left -= 1
            advance(f"{next(iter(node))} of width {probe.dim}", left)
            rounds[-1] += calm(lambda: list(_probe(probe, node, device, now)))  # noqa: B023
    samples = [min(same, key=lambda s: s.seconds) for same in zip(*rounds, strict=True)]
    blocks, rest, error = fit(samples, max(products.values()))
    return Calibration(Environment.here(device), products, bandwidth, launch, blocks, rest, reached(samples), error)


def _product(device: str, n: int) -> float:
    a, b = (torch.randn(n, n, device=device) for _ in range(2))
    run = Runner(lambda: machine.linear(a, b))
    sample(run, device)
    return 2e3 * n**3 / min(sample(run, device, 3) for _ in range(5))


def _probe(probe: Probe, node: Any, device: str, now: Callable[[], float]) -> Iterator[Sample]:
    model = build(_document(probe, [node]), device=device)
    for mode, rows, tokens, before in probe.shapes:
        report = estimate(model, batch_size=rows, seq_len=tokens, context_len=before, mode=mode)  # type: ignore[arg-type]
        yield from samples_of(report, measure_model(model, report, device, ENOUGH, now), node in JOINED)


def samples_of(report: CostReport, measured: Measured, joined: bool) -> Iterator[Sample]:
    """What a measured pass says about its nodes, and if it is `joined`, about what lies around them."""
    for node in report.nodes:
        if node.path in measured.nodes:
            spent = max(measured.nodes[node.path], 1e-4)
            yield Sample(plain(node.block), report.mode, astuple(work_of(node, report)), 1e-3 * spent)
    if joined:
        rest = measured.total - sum(measured.nodes.values())
        yield Sample("", report.mode, astuple(around(report)), 1e-3 * max(rest, 0.01 * measured.total))


def fit(samples: Sequence[Sample], peak: float) -> tuple[dict[tuple[str, str], Rates], dict[str, Rates], float]:
    """Rates by block and mode, of the rest by mode, and the median relative error of the nodes' times. No product is
    done in more than `peak` FLOP/s: the sizes alone do not always tell products from what grows with them."""
    together: defaultdict[tuple[str, str], list[Sample]] = defaultdict(list)
    for s in samples:
        together[s.block, s.mode].append(s)
    found = {
        key: rates([s.features for s in of], [s.seconds for s in of], (0, 1 / peak, 0, 0) if key[0] else ())
        for key, of in together.items()
    }
    errors = [
        abs(sum(r * x for r, x in zip(found[s.block, s.mode], s.features, strict=True)) / s.seconds - 1)
        for s in samples
        if s.block
    ]
    rest = {mode: found.pop((block, mode)) for block, mode in list(found) if not block}
    return found, rest, statistics.median(errors)


def reached(samples: Sequence[Sample]) -> dict[str, dict[str, tuple[float, float]]]:
    """FLOP/s of products that nodes of each kind of work reached, by mode: the middle one and the best."""
    found: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for s in samples:
        if s.block and s.features[1]:
            found[kind_of(s.block), s.mode].append(s.features[1] / s.seconds)
    kinds: dict[str, dict[str, tuple[float, float]]] = {}
    for (kind, mode), speeds in found.items():
        kinds.setdefault(kind, {})[mode] = (statistics.median(speeds), max(speeds))
    return kinds


# ---------------------------------------------------------------------------------------------- models
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
        for mode, rows, tokens, before in probe.shapes:
            estimate(model, batch_size=rows, seq_len=tokens, context_len=before, mode=mode)  # type: ignore[arg-type]
        return True
    except (ConfigError, ValueError, NotImplementedError):
        return False


def _document(probe: Probe, trunk: list[Any]) -> dict[str, Any]:
    return {
        "name": "calibration", "architecture": "causal_lm", "dim": probe.dim, "vocab_size": probe.vocab,
        "trunk": trunk,
    }  # fmt: skip
