"""How well `zoo profile` predicts times on this CPU: writes docs/measured/prediction.md. After `zoo calibrate`:

    python tools/prediction.py

Models, widths and lengths are other ones than those that the calibration measures.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zoo.architectures.storage import build
from zoo.bench.machine import Calm, device_name
from zoo.contract import Mode
from zoo.cost import CostReport, estimate
from zoo.measure.run import Measured, measure_model
from zoo.predict import calibration
from zoo.predict.kinds import plain
from zoo.predict.roofline import Prediction, predict

PAGE = Path(__file__).resolve().parents[1] / "docs" / "measured" / "prediction.md"
NODE_LIMIT, MODEL_LIMIT = 0.25, 0.15
ATTENTION = {"attention": {"num_heads": 6, "num_kv_heads": 2}}
MLA = {"mla": {"num_heads": 4, "kv_lora_rank": 96, "q_lora_rank": 128}}
MOE = {"moe": {"num_experts": 8, "top_k": 2, "hidden_dim": 256}}
FINE_MOE = {
    "moe": {
        "num_experts": 16, "top_k": 4, "hidden_dim": 80, "num_shared_experts": 1, "score": "sigmoid", "balance": "bias",
    },
}  # fmt: skip
WINDOW = {"attention": {"num_heads": 8, "num_kv_heads": 1, "window": 192}}
MODELS: dict[str, Any] = {
    "hydra_small": "hydra_small",
    "llama-like": (192, {"repeat": 4, "of": [ATTENTION, "swiglu"]}),
    "llama-like, wide": (384, {"repeat": 3, "of": [ATTENTION, "swiglu"]}),
    "mamba2-like": (192, {"repeat": 5, "of": ["mamba2"]}),
    "gated_deltanet-like": (192, {"repeat": 4, "of": [{"gated_deltanet": {"num_heads": 3}}, "swiglu"]}),
    "moe-like": (192, {"repeat": 4, "of": [ATTENTION, MOE]}),
    "deepseek-like": (224, {"repeat": 3, "of": [MLA, FINE_MOE]}),
    "kimi-like": (320, {"repeat": 3, "of": [{"kda": {"num_heads": 4}}, "swiglu"]}, {"mla": {"num_heads": 4}}, "swiglu"),
    "griffin-like": (448, {"repeat": 2, "of": ["rg_lru", "swiglu"]}, WINDOW, "swiglu"),
    "looped": (288, "swiglu", {"loop": {"steps": 3}, "of": ["attention", {"mlp": {"hidden_dim": 640}}]}),
    "hymba-like": (192, {"repeat": 3, "of": [{"parallel": [ATTENTION, "mamba"], "merge": "gated"}, "swiglu"]}),
}
# mode, rows, tokens, tokens before
PASSES: tuple[tuple[Mode, int, int, int], ...] = (
    *((mode, *size, 0) for size in ((1, 256), (2, 512), (1, 1536)) for mode in ("prefill", "train")),
    ("decode", 1, 1, 320),
    ("decode", 4, 1, 640),
)
ROUNDS, ENOUGH, PATIENCE = 2, 0.25, 60


@dataclass(frozen=True)
class Case:
    """One model in one pass, measured and predicted."""

    model: str
    report: CostReport
    measured: Measured
    prediction: Prediction

    @property
    def nodes(self) -> list[tuple[str, float]]:
        """Block and predicted / measured, of each node that hooks can see."""
        p, m = self.prediction.nodes, self.measured.nodes
        return [(plain(n.block), p[n.path] / m[n.path]) for n in self.report.nodes if m.get(n.path)]

    @property
    def node_error(self) -> float:
        return statistics.median(abs(ratio - 1) for _, ratio in self.nodes)

    @property
    def ratio(self) -> float:
        return self.prediction.total / self.measured.total

    @property
    def tokens(self) -> str:
        r = self.report
        return f"{r.batch_size} x {r.seq_len}" + (f" after {r.context_len}" if r.context_len else "")


def cases(timing: calibration.Calibration) -> Iterator[Case]:
    """The quickest of `ROUNDS` measurements of each pass: others use the machine too."""
    rounds = zip(*(list(_measured()) for _ in range(ROUNDS)), strict=True)
    for same in rounds:
        name, report, measured = min(same, key=lambda found: found[2].total)
        yield Case(name, report, measured, predict(report, timing))


def _measured() -> Iterator[tuple[str, CostReport, Measured]]:
    calm = Calm(tries=PATIENCE)
    for name, config in MODELS.items():
        model = build(config if isinstance(config, str) else _document(name, *config))
        for mode, rows, tokens, before in PASSES:
            report = estimate(model, batch_size=rows, seq_len=tokens, context_len=before, mode=mode)
            yield name, report, calm(lambda: measure_model(model, report, "cpu", ENOUGH))  # noqa: B023


def _document(name: str, dim: int, *trunk: Any) -> dict[str, Any]:
    return {"name": name, "architecture": "causal_lm", "vocab_size": 1000, "dim": dim, "trunk": [*trunk]}


def page(found: Sequence[Case], timing: calibration.Calibration) -> str:
    """The page as text."""
    e = timing.environment
    lines = [
        "# Predicted and measured times on a CPU",
        "",
        "Written by `python tools/prediction.py` after `zoo calibrate`. The calibration measures every block at widths",
        "64, 128, 256 and 512, in rows of up to 768 tokens; the models below have other widths, options and lengths,",
        "and nothing was fitted to them.",
        "",
        f"{e.processor}, {e.threads} thread{'s' if e.threads > 1 else ''}, {e.dtype}, torch {e.torch}.",
        "",
        f"Wanted: the whole model within {100 * MODEL_LIMIT:.0f} %, the median error of a case's nodes at most "
        f"{100 * NODE_LIMIT:.0f} %.",
        "",
        "| mode | cases | model within | median error | largest | nodes within | median error of a node |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for mode in ("prefill", "train", "decode", ""):
        lines.append(_summary(mode, [c for c in found if mode in ("", c.report.mode)]))
    lines += [
        "",
        "| model | mode | tokens | measured ms | predicted ms | ratio | median error of a node |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for c in found:
        lines.append(
            f"| {c.model} | {c.report.mode} | {c.tokens} | {c.measured.total:.1f} | {c.prediction.total:.1f} | "
            f"{c.ratio:.2f} | {100 * c.node_error:.0f} % |"
        )
    lines += [
        "",
        "Predicted over measured, by block: median, least and most of prefill and training, and of decode.",
        "",
    ]
    lines += [
        "| block | nodes | median | least | most | decode | least | most |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for block in dict.fromkeys(block for c in found for block, _ in c.nodes):
        whole = [ratio for c in found if c.report.mode != "decode" for name, ratio in c.nodes if name == block]
        step = [ratio for c in found if c.report.mode == "decode" for name, ratio in c.nodes if name == block]
        lines.append(f"| {block} | {len(whole) + len(step)} | {_spread(whole)} | {_spread(step)} |")
    return "\n".join(lines) + "\n"


def _summary(mode: str, found: Sequence[Case]) -> str:
    whole, nodes = [abs(c.ratio - 1) for c in found], [c.node_error for c in found]
    every = statistics.median(abs(ratio - 1) for c in found for _, ratio in c.nodes)
    return (
        f"| {mode or 'all'} | {len(found)} | {sum(x <= MODEL_LIMIT for x in whole)} | "
        f"{100 * statistics.median(whole):.0f} % | {100 * max(whole):.0f} % | {sum(x <= NODE_LIMIT for x in nodes)} | "
        f"{100 * every:.0f} % |"
    )


def _spread(ratios: Sequence[float]) -> str:
    return f"{statistics.median(ratios):.2f} | {min(ratios):.2f} | {max(ratios):.2f}"


def main() -> int:
    timing = calibration.load("cpu")
    if timing is None or timing.environment != calibration.Environment.here("cpu"):
        print(f"calibrate {device_name('cpu')} with {torch.get_num_threads()} threads first: zoo calibrate")
        return 2
    text = page(list(cases(timing)), timing)
    PAGE.write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
