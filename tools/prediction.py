"""How well `zoo profile` predicts times on this CPU: writes docs/measured/prediction.md. After `zoo calibrate`:

    python tools/prediction.py

Models, widths and lengths are other ones than those that the calibration measures.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zoo.architectures.storage import build
from zoo.bench.machine import Calm, device_name
from zoo.cost import CostReport, estimate
from zoo.measure.run import Measured, measure_model
from zoo.predict import calibration
from zoo.predict.roofline import Prediction, predict

PAGE = Path(__file__).resolve().parents[1] / "docs" / "measured" / "prediction.md"
NODE_LIMIT, MODEL_LIMIT = 0.25, 0.15
ATTENTION = {"attention": {"num_heads": 6, "num_kv_heads": 2}}
MODELS: dict[str, Any] = {
    "hydra_small": "hydra_small",
    "llama-like": {"dim": 192, "trunk": [{"repeat": 4, "of": [ATTENTION, "swiglu"]}]},
    "llama-like, wide": {"dim": 384, "trunk": [{"repeat": 3, "of": [ATTENTION, "swiglu"]}]},
    "mamba2-like": {"dim": 192, "trunk": [{"repeat": 5, "of": ["mamba2"]}]},
    "gated_deltanet-like": {
        "dim": 192, "trunk": [{"repeat": 4, "of": [{"gated_deltanet": {"num_heads": 3}}, "swiglu"]}],
    },
    "moe-like": {
        "dim": 192,
        "trunk": [{"repeat": 4, "of": [ATTENTION, {"moe": {"num_experts": 8, "top_k": 2, "hidden_dim": 256}}]}],
    },
}  # fmt: skip
SIZES = ((1, 256), (2, 512))
ROUNDS, ENOUGH, PATIENCE = 3, 0.4, 40


@dataclass(frozen=True)
class Case:
    """One model in one mode, measured and predicted."""

    model: str
    report: CostReport
    measured: Measured
    prediction: Prediction

    @property
    def nodes(self) -> list[tuple[str, float]]:
        """Block and predicted / measured, of each node that hooks can see."""
        p, m = self.prediction.nodes, self.measured.nodes
        return [(n.block, p[n.path] / m[n.path]) for n in self.report.nodes if m.get(n.path)]

    @property
    def node_error(self) -> float:
        return statistics.median(abs(ratio - 1) for _, ratio in self.nodes)

    @property
    def ratio(self) -> float:
        return self.prediction.total / self.measured.total


def cases(timing: calibration.Calibration) -> Iterator[Case]:
    """Prefill and training, the quickest of `ROUNDS` measurements: others use the machine too."""
    rounds = zip(*(list(_measured()) for _ in range(ROUNDS)), strict=True)
    for same in rounds:
        name, report, measured = min(same, key=lambda found: found[2].total)
        yield Case(name, report, measured, predict(report, timing))


def _measured() -> Iterator[tuple[str, CostReport, Measured]]:
    calm = Calm(tries=PATIENCE)
    for name, config in MODELS.items():
        document = config if isinstance(config, str) else {
            "name": name, "architecture": "causal_lm", "vocab_size": 1000, **config,
        }  # fmt: skip
        model = build(document)
        for rows, tokens in SIZES:
            for mode in ("prefill", "train"):
                report = estimate(model, batch_size=rows, seq_len=tokens, mode=mode)
                yield name, report, calm(lambda: measure_model(model, report, "cpu", ENOUGH))  # noqa: B023


def page(found: list[Case], timing: calibration.Calibration) -> str:
    """The page as text."""
    every = [abs(ratio - 1) for case in found for _, ratio in case.nodes]
    whole = [abs(case.ratio - 1) for case in found]
    blocks: dict[str, list[float]] = {}
    for case in found:
        for block, ratio in case.nodes:
            blocks.setdefault(block, []).append(ratio)
    e = timing.environment
    lines = [
        "# Predicted and measured times on a CPU",
        "",
        "Written by `python tools/prediction.py` after `zoo calibrate`. The calibration measures every block at widths",
        "64, 128 and 256; the models below have other widths, options and lengths.",
        "",
        f"{e.processor}, {e.threads} thread{'s' if e.threads > 1 else ''}, {e.dtype}, torch {e.torch}.",
        "",
        f"- per node: median error {100 * statistics.median(every):.0f} % over all nodes "
        f"(wanted: at most {100 * NODE_LIMIT:.0f} % in a case; {_within([c.node_error for c in found], NODE_LIMIT)})",
        f"- whole model: median error {100 * statistics.median(whole):.0f} %, largest {100 * max(whole):.0f} % "
        f"(wanted: at most {100 * MODEL_LIMIT:.0f} %; {_within(whole, MODEL_LIMIT)})",
        "",
        "| model | mode | tokens | measured ms | predicted ms | ratio | median error of a node |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for c in found:
        tokens = f"{c.report.batch_size} x {c.report.seq_len}"
        lines.append(
            f"| {c.model} | {c.report.mode} | {tokens} | {c.measured.total:.1f} | {c.prediction.total:.1f} | "
            f"{c.ratio:.2f} | {100 * c.node_error:.0f} % |"
        )
    lines += ["", "Predicted over measured, by block: median, least and most.", ""]
    lines += ["| block | nodes | median | least | most |", "|---|---:|---:|---:|---:|"]
    for block, ratios in blocks.items():
        middle = statistics.median(ratios)
        lines.append(f"| {block} | {len(ratios)} | {middle:.2f} | {min(ratios):.2f} | {max(ratios):.2f} |")
    return "\n".join(lines) + "\n"


def _within(errors: list[float], limit: float) -> str:
    return f"{sum(error <= limit for error in errors)} of {len(errors)} cases"


def main() -> int:
    timing = calibration.load("cpu")
    if timing is None or timing.environment != calibration.Environment.here("cpu"):
        print(f"calibrate {device_name('cpu')} with {torch.get_num_threads()} threads first: zoo calibrate")
        return 2
    found = list(cases(timing))
    PAGE.write_text(page(found, timing), encoding="utf-8")
    print(page(found, timing))
    return 0


if __name__ == "__main__":
    sys.exit(main())
