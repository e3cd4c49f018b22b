"""Associative recall (MQAR) against bytes of state.

Claim: a mixer with a state of constant size recalls as many key-value pairs as its state has room for, and at equal
size those that overwrite (delta rule) recall more than those that only add (Zoology, arXiv:2312.04927; Based,
arXiv:2402.18668; DeltaNet, arXiv:2406.06484).

Measured: every causal mixer of the registry whose state does not grow, at two sizes of its state, and attention. A
model has two layers without feed-forward networks: a gated convolution over four tokens, the same for all, which lets
a value see its key, then the mixer. All are trained on the same batches with the same settings; the accuracy is that of
fresh samples. The bytes are those of the mixer's state for one row of the task.

Refuted if accuracy does not rise with bytes, if the delta rule is no better than linear attention of the same size, or
if a constant state does as well as attention at a small fraction of its bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

import zoo
from claims.common import NOT_HERE, OPPOSITE, SHOWS, Report, Result, Verdict, label_points, style, train
from zoo import registry
from zoo.sections import DataSection
from zoo.train.synthetic import IGNORE, Sample, make_task

DIM, VOCAB, PAIRS, LENGTH, BATCH = 64, 128, 16, 64, 32
STEPS, LR, SEED, SOLVED = 400, 4e-3, 0, 0.99
CONVOLUTION = {"hyena": {"filter_len": 4, "filter_dim": 16}}
# small and large state, by the first of these options that a mixer has; others have one size only
SIZES: dict[str, tuple[Any, Any]] = {"num_heads": (4, 1), "state_dim": (16, 64), "lru_width": (64, 256)}
# where the state follows from other options, or the usual sizes are made for longer rows
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "based": [{"num_heads": 4, "feature_dim": 4}, {"num_heads": 4, "feature_dim": 12}],
    "hyena": [{"filter_len": 16}, {"filter_len": LENGTH}],
    "lact": [{"num_fast_heads": n, "chunk_size": 8, "window": 8} for n in (4, 1)],
    "lru": [{"state_dim": 64}, {"state_dim": 256}],
    "mamba2": [{"state_dim": n, "head_dim": 32} for n in (8, 32)],
    "mamba3": [{"state_dim": n, "head_dim": 32} for n in (8, 32)],
    "mamba": [{"state_dim": 8}, {"state_dim": 32}],
    "window_global": [{"num_heads": 4, "window": n, "num_globals": n, "chunk_size": 16} for n in (8, 16)],
}
DELTA = ("deltanet", "gated_deltanet", "kda", "rwkv7")
ADDING = ("linear_attention", "lightning", "simple_gla", "gla", "retention")


def subjects() -> dict[str, list[dict[str, Any]]]:
    """Options of every mixer that is measured."""
    cards = [registry.block_card(name) for name in zoo.list_blocks("mixer")]
    found: dict[str, list[dict[str, Any]]] = {"attention": [{"num_heads": 4}]}
    for card in cards:
        if card.causal and card.state_growth == "constant" and card.provider == "block-zoo":
            option = next((o for o in SIZES if o in registry.options(card.name)), None)
            sizes = [{option: size} for size in SIZES[option]] if option else [{}]
            found[card.name] = OPTIONS.get(card.name, sizes)
    return found


def batches(task: Sample, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches (inputs, labels) [size, T]; batch n is the same in every run."""
    number = 0
    while True:
        samples = [task(np.random.default_rng([seed, number, row])) for row in range(size)]
        inputs, labels = (torch.from_numpy(np.stack(part)).long() for part in zip(*samples, strict=True))
        yield inputs, labels
        number += 1


def accuracy(model: Any, inputs: Tensor, labels: Tensor) -> float:
    """Share of scored positions answered right."""
    with torch.no_grad():
        right = model(inputs).argmax(-1) == labels
    return right[labels != IGNORE].float().mean().item()


def run(report: Report) -> Result:
    task = make_task(DataSection(source="mqar", num_pairs=PAIRS), LENGTH, VOCAB)
    fresh = next(batches(task, 256, seed=10**6))
    stream = batches(task, BATCH, SEED)
    seen: list[tuple[Tensor, Tensor]] = [next(stream) for _ in range(report.steps(STEPS))]
    runs = [(mixer, options) for mixer, sizes in subjects().items() for options in sizes]
    if report.tiny:
        runs = [r for r in runs if r[0] in ("attention", "gla")]
    rows = []
    for mixer, options in runs:
        # tied embeddings keep attention on its plateau ten times longer here
        config = {
            "dim": DIM,
            "vocab_size": VOCAB,
            "trunk": [[CONVOLUTION], [{mixer: options}]],
            "tie_embeddings": False,
        }
        model = zoo.build(config, seed=SEED)
        mixed = zoo.create_block(mixer, DIM, **options, device="meta")
        bar = report.bar(f"{mixer} {mixed.state_bytes(1, LENGTH):,} B", len(seen))
        done = train(model, seen, bar, steps=len(seen), lr=LR, score=lambda m=model: accuracy(m, *fresh), solved=SOLVED)
        rows.append(
            {
                "mixer": mixer,
                "options": options,
                "state_bytes": mixed.state_bytes(1, LENGTH),
                "accuracy": round(done.score or 0.0, 4),
                "steps": done.steps,
                "params": sum(p.numel() for p in model.parameters()),
                "cpu_seconds": done.cpu_seconds,
            }
        )
    for row in rows:
        row["setting"] = ", ".join(f"{k} {v}" for k, v in row["options"].items())
    rows.sort(key=lambda r: (-r["accuracy"], r["state_bytes"]))
    columns = [
        ("mixer", "mixer", ""), ("setting", "options", ""), ("state_bytes", "state, bytes", ","),
        ("accuracy", "accuracy", ".1%"), ("steps", "steps", ","), ("cpu_seconds", "CPU s", ".1f"),
    ]  # fmt: skip
    settings = {
        "seed": SEED, "dim": DIM, "vocabulary": VOCAB, "pairs": PAIRS, "tokens": LENGTH, "batch": BATCH,
        "steps at most": STEPS, "lr": LR, "stop at accuracy": SOLVED, "first layer": CONVOLUTION,
    }  # fmt: skip
    return Result(columns, rows, verdicts(rows), settings)


def verdicts(rows: list[dict[str, Any]]) -> list[Verdict]:
    """What the figures say."""
    best = {r["mixer"]: r for r in reversed(rows)}
    found = []
    pairs = [[r for r in rows if r["mixer"] == name] for name in best]
    pairs = [sorted(p, key=lambda r: r["state_bytes"]) for p in pairs if len(p) == 2]
    if pairs:
        more = [p for p in pairs if p[1]["accuracy"] > p[0]["accuracy"] + 0.02]
        less = [p for p in pairs if p[1]["accuracy"] < p[0]["accuracy"] - 0.02]
        verdict = SHOWS if len(more) > 2 * len(less) else OPPOSITE if len(less) > len(more) else NOT_HERE
        found.append(
            Verdict(
                "A larger state of the same mixer recalls more.",
                verdict,
                f"Of {len(pairs)} mixers at two sizes {len(more)} recall over 2 points more with the larger state, "
                f"{len(less)} over 2 points less.",
            )
        )
    if all(name in best for name in (*DELTA, *ADDING)):
        delta, adding = ([best[n]["accuracy"] for n in names] for names in (DELTA, ADDING))
        verdict = SHOWS if min(delta) > max(adding) else OPPOSITE if max(delta) < min(adding) else NOT_HERE
        found.append(
            Verdict(
                "The delta rule recalls more than states that only add.",
                verdict,
                f"{', '.join(DELTA)}: {min(delta):.1%} to {max(delta):.1%}; {', '.join(ADDING)}: {min(adding):.1%} to "
                f"{max(adding):.1%}.",
            )
        )
    return found


def draw(result: Result, figure: Any) -> None:
    axes = figure.subplots()
    for number, mixer in enumerate(dict.fromkeys(r["mixer"] for r in result.rows)):
        mine = sorted((r for r in result.rows if r["mixer"] == mixer), key=lambda r: r["state_bytes"])
        axes.plot([r["state_bytes"] for r in mine], [100 * r["accuracy"] for r in mine], linewidth=0.6, **style(number))
    axes.set_xscale("log", base=2)
    axes.set_xlabel("bytes of the mixer's state, one row")
    axes.set_ylabel("accuracy, %")
    axes.set_title(f"{result.settings['pairs']} pairs in {result.settings['tokens']} tokens", fontsize=10)
    axes.grid(alpha=0.3)
    label_points(axes, [(r["state_bytes"], 100 * r["accuracy"], r["mixer"]) for r in result.rows])
