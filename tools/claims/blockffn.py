"""Token- and chunk-level sparsity of BlockFFN over training.

Claim: with a loss that asks neighbouring tokens for the same experts and one that asks chunks for few, over 80 % of
the experts are silent for a token (TLS) and over 70 % for all of eight tokens (CLS8) (arXiv:2507.08771).

Measured: three language models with BlockFFN in every layer, on the same bytes of the Python library's sources: without
the losses, with a tenth of the published coefficients, with the published ones (constant; the paper steers the second
one as it trains). TLS, CLS8 and CLS64 are those of the training batches, whose text never comes twice, averaged over
layers and the last steps. Last column: of the experts that 64 tokens use, the part that one of them uses.

Refuted if the losses do not raise CLS8, or if the published coefficients do not reach the two figures. Where one token
uses nearly all that 64 tokens use, the experts left are the same for everybody and the router chooses nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np

import zoo
from claims._text import VOCAB, Text
from claims.common import NOT_HERE, OPPOSITE, SHOWS, Report, Result, Verdict, style, train
from zoo.blocks.blockffn import BlockFFN

DIM, LAYERS, LENGTH, BATCH, HELDOUT = 64, 4, 128, 8, 16384
STEPS, LR, SEED, LAST, EVERY = 400, 4e-3, 0, 20, 4
EXPERTS = {"num_experts": 32, "expert_dim": 8}
LOCALITY, SPARSITY = 2e-3, 5e-2  # as published
SHARES = {"no losses": 0.0, "a tenth of the losses": 0.1, "published losses": 1.0}
METRICS = ("TLS", "CLS8", "CLS64")


def config(share: float) -> dict[str, Any]:
    """A model with a share of the published coefficients."""
    losses = {"locality_coef": share * LOCALITY, "sparsity_coef": share * SPARSITY}
    layer = [{"attention": {"num_heads": 4}}, {"blockffn": {**EXPERTS, **losses}}]
    return {"dim": DIM, "vocab_size": VOCAB, "trunk": [{"repeat": LAYERS, "of": [layer]}]}


def run(report: Report) -> Result:
    text, steps = Text(LENGTH, HELDOUT, tiny=report.tiny), report.steps(STEPS)
    rows, curves = [], {}
    for name, share in SHARES.items():
        model = zoo.build(config(share), seed=SEED)
        parts = [m for m in model.modules() if isinstance(m, BlockFFN)]
        seen: list[list[float]] = []

        def watch(step: int, loss: float, parts: Any = parts, seen: list[list[float]] = seen) -> None:
            seen.append([float(np.mean([float(p.metrics[m]) for p in parts])) for m in METRICS])

        bar = report.bar(name, steps)
        batches = text.batches(BATCH, SEED)
        done = train(model, batches, bar, steps=steps, lr=LR, weight_decay=0.1, after_step=watch)
        bits = text.bits(model)
        bar.at(steps, f"{bits:.3f} bits per byte")
        tls, cls8, cls64 = np.mean(seen[-LAST:], 0).tolist()
        rows.append(
            {
                "model": name,
                "TLS": round(tls, 4),
                "CLS8": round(cls8, 4),
                "CLS64": round(cls64, 4),
                "part": round((1 - tls) / max(1 - cls64, 1e-9), 4),
                "bits": round(bits, 4),
                "cpu_seconds": done.cpu_seconds,
            }
        )
        mean = [np.mean(seen[i : i + EVERY], 0).round(4).tolist() for i in range(0, steps, EVERY)]
        curves[name] = {m: [point[i] for point in mean] for i, m in enumerate(METRICS)}
    columns = [
        ("model", "model", ""), ("TLS", "TLS", ".1%"), ("CLS8", "CLS8", ".1%"), ("CLS64", "CLS64", ".1%"),
        ("bits", "held-out bits per byte", ".3f"), ("cpu_seconds", "CPU s", ".1f"),
        ("part", "of the experts of 64 tokens one uses", ".0%"),
    ]  # fmt: skip
    settings = {
        "seed": SEED, "dim": DIM, "layers": LAYERS, **EXPERTS, "locality_coef": LOCALITY, "sparsity_coef": SPARSITY,
        "chunk_size": 64, "steps": steps, "tokens": LENGTH, "batch": BATCH, "lr": LR, "last steps": LAST,
        "held-out bytes": text.heldout_bytes,
    }  # fmt: skip
    return Result(columns, rows, judge(rows), settings, {"every": EVERY, "curves": curves})


def judge(rows: list[dict[str, Any]]) -> list[Verdict]:
    """What the figures say."""
    none, tenth, full = rows
    gain = full["CLS8"] - none["CLS8"]

    def figures(row: dict[str, Any]) -> str:
        return f"{row['TLS']:.1%} and {row['CLS8']:.1%}, for {row['bits'] - none['bits']:+.3f} bits per byte"

    return [
        Verdict(
            "The two losses raise chunk-level sparsity.",
            SHOWS if gain > 0.05 else OPPOSITE if gain < -0.05 else NOT_HERE,
            f"CLS8 {full['CLS8']:.1%} with them, {tenth['CLS8']:.1%} with a tenth of them, {none['CLS8']:.1%} without.",
        ),
        Verdict(
            "Over 80 % TLS and over 70 % CLS8.",
            SHOWS if full["TLS"] > 0.8 and full["CLS8"] > 0.7 else NOT_HERE,
            f"{figures(full)}; with a tenth of the losses {figures(tenth)}.",
        ),
        Verdict(
            "With the published coefficients each token still chooses its own experts.",
            SHOWS if full["part"] < 0.8 else NOT_HERE,
            f"A token uses {full['part']:.0%} of the experts that 64 tokens use; with a tenth of the losses "
            f"{tenth['part']:.0%}, without {none['part']:.0%}.",
        ),
    ]


def draw(result: Result, figure: Any) -> None:
    lines = dict(zip(METRICS, ("-", "--", ":"), strict=True))
    axes = figure.subplots()
    every = result.series["every"]
    for number, (name, curves) in enumerate(result.series["curves"].items()):
        for metric, values in curves.items():
            steps = every * (np.arange(len(values)) + 0.5)
            axes.plot(steps, 100 * np.array(values), lines[metric], color=style(number)["color"], linewidth=1.3)
        axes.plot([], [], color=style(number)["color"], label=name)
    for metric, line in lines.items():
        axes.plot([], [], line, color="black", label=metric)
    axes.set_xlabel("step")
    axes.set_ylabel("silent experts, %")
    axes.set_ylim(0, 100)
    axes.grid(alpha=0.3)
    axes.legend(ncols=2, fontsize=7, loc=(0.57, 0.3))
