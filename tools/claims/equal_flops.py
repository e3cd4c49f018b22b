"""Held-out bits per byte at equal training FLOPs: vanilla, looped, MoR, MoD.

Claim: at equal training FLOPs a Mixture-of-Recursions has a lower validation loss than a plain transformer and than a
looped one, with fewer parameters (arXiv:2507.10524); a Mixture-of-Depths is at least as good as the plain transformer,
and a forward pass of it costs a fraction (arXiv:2404.02258).

Measured: six layers deep each: six layers; a first, two looped twice, a last; the same where the second turn of the
loop takes half of the tokens (expert choice); six layers of which every second takes an eighth of the tokens. Bytes of
the Python library's sources; the number of steps is what makes `zoo.estimate`'s training FLOPs equal. Held-out text is
judged as a stream would be: routers decide token by token. A difference counts where it is larger than twice the
deviation between seeds. And a plain transformer of three layers, which also takes more and cheaper steps, but without a
router.

Refuted if the plain transformer ends below the routed ones; if the shallow one does too, the routers' gain is that of
more steps.
"""

from __future__ import annotations

from typing import Any

import numpy as np

import zoo
from claims._text import VOCAB, Text
from claims.common import NOT_HERE, OPPOSITE, SHOWS, Report, Result, Verdict, style, train

DIM, LENGTH, BATCH, HELDOUT = 64, 128, 4, 16384
STEPS, LR, SEEDS, POINTS = 240, 4e-3, (0, 1), 5  # steps: those of the plain transformer
LAYER = [{"attention": {"num_heads": 4}}, {"swiglu": {"hidden_dim": 176}}]
TWO = ["layer", "layer"]
TRUNKS: dict[str, list[Any]] = {
    "vanilla": [{"repeat": 6, "of": "layer"}],
    "looped": ["layer", {"loop": 2, "of": TWO}, "layer"],
    "MoR": ["layer", {"loop": {"steps": 2, "router": {"expert_choice": {"capacity": [1.0, 0.5]}}}, "of": TWO}, "layer"],
    "MoD": [{"repeat": 3, "of": ["layer", {"route": "layer", "router": {"mod": {"capacity": 0.125}}}]}],
    "vanilla, 3 layers": [{"repeat": 3, "of": "layer"}],
}


def config(name: str) -> dict[str, Any]:
    """One of the models."""
    return {"dim": DIM, "vocab_size": VOCAB, "define": {"layer": LAYER}, "trunk": TRUNKS[name]}


def run(report: Report) -> Result:
    text = Text(LENGTH, HELDOUT, tiny=report.tiny)
    costs = {name: zoo.estimate(config(name), batch_size=BATCH, seq_len=LENGTH) for name in TRUNKS}
    budget = report.steps(STEPS) * costs["vanilla"].flops
    steps = {name: round(budget / cost.flops) for name, cost in costs.items()}
    curves: dict[str, list[list[float]]] = {name: [] for name in TRUNKS}
    seconds = dict.fromkeys(TRUNKS, 0.0)
    for seed in SEEDS[: 1 if report.tiny else None]:
        for name in TRUNKS:
            model, curve = zoo.build(config(name), seed=seed), []
            every = -(-steps[name] // POINTS)

            def glance(model: Any = model, curve: list[float] = curve) -> float:
                curve.append(round(text.bits(model), 4))
                return curve[-1]

            bar = report.bar(f"{name}, seed {seed}", steps[name])
            batches = text.batches(BATCH, seed)
            done = train(model, batches, bar, steps=steps[name], lr=LR, weight_decay=0.1, score=glance, every=every)
            curves[name].append(curve)
            seconds[name] += done.cpu_seconds
    rows = [
        {
            "model": name,
            "params": costs[name].params,
            "flops_per_token": round(costs[name].flops / BATCH / LENGTH),
            "steps": steps[name],
            "flops": steps[name] * costs[name].flops,
            "bits": round(float(np.mean([c[-1] for c in curves[name]])), 4),
            "bits_of_seeds": [c[-1] for c in curves[name]],
            "cpu_seconds": round(seconds[name], 1),
        }
        for name in TRUNKS
    ]
    columns = [
        ("model", "model", ""), ("params", "parameters", ","), ("flops_per_token", "training FLOPs a token", ","),
        ("steps", "steps", ","), ("flops", "training FLOPs", ".4g"), ("bits", "held-out bits per byte", ".3f"),
        ("bits_of_seeds", "of each seed", ""), ("cpu_seconds", "CPU s", ".1f"),
    ]  # fmt: skip
    settings = {
        "seeds": SEEDS, "dim": DIM, "layer": LAYER, "tokens": LENGTH, "batch": BATCH, "lr": LR,
        "held-out bytes": text.heldout_bytes,
    }  # fmt: skip
    points = {
        name: [min(n * -(-steps[name] // POINTS), steps[name]) * costs[name].flops for n in range(1, len(c[0]) + 1)]
        for name, c in curves.items()
    }
    return Result(columns, rows, judge(rows), settings, {"flops": points, "bits": curves})


def judge(rows: list[dict[str, Any]]) -> list[Verdict]:
    """What the figures say."""
    found = {r["model"]: r for r in rows}
    between = [np.var(r["bits_of_seeds"], ddof=1) for r in rows if len(r["bits_of_seeds"]) > 1]
    noise = float(np.sqrt(np.mean(between))) if between else 0.0

    def verdict(claim: str, better: str, worse: str, *, equal: str = NOT_HERE) -> Verdict:
        a, b = found[better]["bits"], found[worse]["bits"]
        said = SHOWS if a < b - 2 * noise else OPPOSITE if a > b + 2 * noise else equal
        return Verdict(claim, said, f"{better} {a:.3f}, {worse} {b:.3f} bits per byte; seeds deviate by {noise:.3f}.")

    shallow = "vanilla, 3 layers"
    return [
        verdict("MoR ends lower than a plain transformer of its depth.", "MoR", "vanilla"),
        verdict("MoR ends lower than a looped transformer of the same layers.", "MoR", "looped"),
        verdict("MoD is at least as good as a plain transformer of its depth.", "MoD", "vanilla", equal=SHOWS),
        verdict("MoD ends lower than a plain transformer without its routed layers.", "MoD", shallow),
    ]


def draw(result: Result, figure: Any) -> None:
    axes = figure.subplots()
    for number, (name, bits) in enumerate(result.series["bits"].items()):
        flops = result.series["flops"][name]
        for curve in bits:
            axes.plot(flops, curve, color=style(number)["color"], linewidth=0.5)
        axes.plot(flops, np.mean(bits, 0), label=name, **style(number))
    axes.set_xlabel("training FLOPs")
    axes.set_ylabel("held-out bits per byte")
    axes.set_title(f"mean of {len(result.settings['seeds'])} seeds; thin: each", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend()
