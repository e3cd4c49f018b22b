"""Associative recall (MQAR) against bytes of state.

Claim: a mixer with a state of constant size recalls as many key-value pairs as its state has room for (Based,
arXiv:2402.18668), those that overwrite (delta rule) more than those that only add (DeltaNet, arXiv:2406.06484), and
those whose mixing does not depend on the input hardly any (Zoology, arXiv:2312.04927).

Measured: every causal mixer of the registry whose state does not grow, at two sizes of its state, and attention. A
model is one mixer between embedding and head; a token is embedded beside the token before it, so that a value lies
beside its key and no mixer needs a convolution of its own for that. All see the same batches, of 2, 4, 8 and 16 pairs
in turn (with 16 alone all of them stay longer at guessing any value of the row), and share all settings. The accuracy
is that of fresh samples; the bytes are those of the state for one row of 16 pairs. Training is short: a low accuracy
may mean that a mixer learns slowly, not that its state is full.

Refuted if accuracy does not rise with bytes, if the delta rule is no better than adding at the same size, or if mixing
that does not depend on the input recalls as much.
"""

from __future__ import annotations

from typing import Any

import zoo
from claims._probe import Probe, accuracy, batches
from claims.common import NOT_HERE, OPPOSITE, SHOWS, Report, Result, Verdict, label_points, style, train
from zoo import registry
from zoo.sections import DataSection
from zoo.train.synthetic import make_task

DIM, VOCAB, PAIRS, TOKENS = 64, 48, (2, 4, 8, 16), 512
STEPS, LR, SEED, SOLVED = 1000, 1e-2, 0, 0.995
MARGIN = 0.05  # of accuracy: what one seed may be off by
LENGTH, BEST = 4 * PAIRS[-1], f"accuracy_{PAIRS[-1]}"
# a small and a large state, by the first of these options that a mixer has; others have one size only
SIZES: dict[str, tuple[Any, Any]] = {"num_heads": (8, 2), "state_dim": (8, 32)}
# where bytes follow from other options, or defaults are made for longer rows
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "based": [{"num_heads": 4, "feature_dim": n} for n in (2, 6)],
    "hyena": [{"filter_len": n} for n in (8, 32)],
    "lact": [{"num_fast_heads": n, "chunk_size": 8, "window": 8} for n in (8, 2)],
    "lru": [{"state_dim": n} for n in (64, 256)],
    "mamba": [{"state_dim": n} for n in (4, 16)],
    "mamba2": [{"state_dim": n, "head_dim": 32} for n in (4, 16)],
    "mamba3": [{"state_dim": n, "head_dim": 32} for n in (4, 16)],
    "rg_lru": [{"lru_width": n} for n in (64, 256)],
    "window_global": [{"num_heads": 4, "window": n, "num_globals": n, "chunk_size": 16} for n in (4, 16)],
}
DELTA = ("deltanet", "gated_deltanet", "kda", "rwkv7")
ADDING = ("gla", "lightning", "linear_attention", "retention", "simple_gla")
FIXED = ("hyena", "lru", "s4d")  # the mixing of tokens does not depend on them, but for a gate around it in hyena


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


def run(report: Report) -> Result:
    tasks = [make_task(DataSection(source="mqar", num_pairs=n), 4 * n, VOCAB) for n in PAIRS]
    streams = [batches(task, TOKENS // (4 * n), SEED) for task, n in zip(tasks, PAIRS, strict=True)]
    steps = report.steps(STEPS)
    seen = [next(streams[i % len(PAIRS)]) for i in range(steps)]
    fresh = [next(batches(task, 2048 // n, seed=10**6)) for task, n in zip(tasks, PAIRS, strict=True)]
    runs = [(mixer, options) for mixer, sizes in subjects().items() for options in sizes]
    if report.tiny:
        runs = [r for r in runs if r[0] in ("attention", "gla")]
    rows = []
    for mixer, options in runs:
        model = Probe(DIM, VOCAB, [(mixer, options)], SEED)
        state = model.mixers[0].state_bytes(1, LENGTH)
        bar = report.bar(f"{mixer} {state:,} B", steps)
        done = train(
            model,
            seen,
            bar,
            steps=steps,
            lr=LR,
            every=100,
            score=lambda m=model: accuracy(m, *fresh[-1]),
            solved=SOLVED,
        )
        scores = [accuracy(model, *part) for part in fresh]
        rows.append(
            {
                "mixer": mixer,
                "options": options,
                "setting": ", ".join(f"{k} {v}" for k, v in options.items()),
                "state_bytes": state,
                **{f"accuracy_{n}": round(score, 4) for n, score in zip(PAIRS, scores, strict=True)},
                "steps": done.steps,
                "params": sum(p.numel() for p in model.parameters()),
                "cpu_seconds": done.cpu_seconds,
            }
        )
    rows.sort(key=lambda r: (-r[BEST], r["state_bytes"]))
    columns = [
        ("mixer", "mixer", ""), ("setting", "options", ""), ("state_bytes", "state, bytes", ","),
        *((f"accuracy_{n}", f"{n} pairs", ".1%") for n in PAIRS), ("steps", "steps", ","),
        ("cpu_seconds", "CPU s", ".1f"),
    ]  # fmt: skip
    settings = {
        "seed": SEED, "dim": DIM, "vocabulary": VOCAB, "pairs": PAIRS, "tokens a row": "4 a pair",
        "tokens a batch": TOKENS, "steps at most": STEPS, "lr": LR, "stop at accuracy": SOLVED,
    }  # fmt: skip
    return Result(columns, rows, judge(rows), settings)


def judge(rows: list[dict[str, Any]]) -> list[Verdict]:
    """What the figures say."""
    by_mixer = {name: [r for r in rows if r["mixer"] == name] for name in dict.fromkeys(r["mixer"] for r in rows)}
    best = {name: max(r[BEST] for r in mine) for name, mine in by_mixer.items()}
    pairs = [sorted(mine, key=lambda r: r["state_bytes"]) for mine in by_mixer.values() if len(mine) == 2]
    found = []
    if pairs:
        more = sum(large[BEST] > small[BEST] + MARGIN for small, large in pairs)
        less = sum(large[BEST] < small[BEST] - MARGIN for small, large in pairs)
        verdict = SHOWS if more > 2 * less else OPPOSITE if less > more else NOT_HERE
        evidence = (
            f"Of {len(pairs)} mixers at two sizes {more} recall over {100 * MARGIN:.0f} points more with the larger"
        )
        found.append(Verdict("A larger state of a mixer recalls more.", verdict, f"{evidence} state, {less} less."))
    for claim, better, worse in (
        ("The delta rule recalls more than states that only add.", DELTA, ADDING),
        ("States that depend on the input recall more than those that do not.", (*DELTA, *ADDING), FIXED),
    ):
        if all(name in best for name in (*better, *worse)):
            above, below = ([r[BEST] for n in names for r in by_mixer[n]] for names in (better, worse))
            gain = sum(above) / len(above) - sum(below) / len(below)
            verdict = SHOWS if gain > MARGIN else OPPOSITE if gain < -MARGIN else NOT_HERE
            parts = [f"{', '.join(names)}: {_range(by_mixer, names)}" for names in (better, worse)]
            found.append(Verdict(claim, verdict, "; ".join(parts) + f", after {STEPS:,} steps at most."))
    return found


def _range(by_mixer: dict[str, list[dict[str, Any]]], names: tuple[str, ...]) -> str:
    values = [r[BEST] for name in names for r in by_mixer[name]]
    return f"{min(values):.1%} to {max(values):.1%}, mean {sum(values) / len(values):.1%}"


def draw(result: Result, figure: Any) -> None:
    axes = figure.subplots()
    for number, mixer in enumerate(dict.fromkeys(r["mixer"] for r in result.rows)):
        mine = sorted((r for r in result.rows if r["mixer"] == mixer), key=lambda r: r["state_bytes"])
        axes.plot([r["state_bytes"] for r in mine], [100 * r[BEST] for r in mine], linewidth=0.6, **style(number))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("bytes of the mixer's state, one row")
    axes.set_ylabel(f"accuracy at {PAIRS[-1]} pairs, %")
    axes.grid(alpha=0.3)
    axes.set_ylim(0, 108)
    small = {r["mixer"]: r for r in sorted(result.rows, key=lambda r: -r["state_bytes"])}  # a line leads to the other
    label_points(axes, [(r["state_bytes"], 100 * r[BEST], r["mixer"]) for r in small.values()])
