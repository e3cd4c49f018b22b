"""Passkey retrieval at up to 16 times the training length.

Claim: hierarchical sparse attention (RAMba), trained on short rows, finds a passkey in rows many times longer, because
it retrieves chunks by content and keeps no positions (arXiv:2504.16795: trained at 4K, right at 64M). Whether other
sparse attention does is asked beside it, of landmark attention (arXiv:2305.16300) above all.

Measured: one mixer between embedding and head, trained on rows of 64 tokens with 1 to 8 needles `key value` among
filler, the keys asked for again at the end; then the share of right answers in fresh rows of 64 to 1024 tokens with 8
needles. Guessing one of the row's values gives 12.5 %. A token is embedded beside the one before it. Sparse mixers
read four blocks of 8 tokens, half of what they see in training and a thirty-second at the end; each is trained with
and without rotary positions where it has them. `mamba2 + hsa` is RAMba's order, and `mamba2` alone tells what its
state remembers; these two learn slowly and get three times the steps. Landmark attention gets a token of its own
behind every 7, as in its paper. The rate is the one of 0.002, 0.004 and 0.01 with which the models know most at 64
tokens.

Refuted if hsa falls from its accuracy at 64 tokens by more than a tenth at 1024, or if dense attention without
positions keeps as much of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from claims._probe import Probe, accuracy, batches
from claims.common import NOT_HERE, OPPOSITE, SHOWS, Report, Result, Verdict, style, train
from zoo.sections import DataSection
from zoo.train.synthetic import make_task

DIM, VOCAB, LENGTH, PAIRS, TOKENS = 64, 48, 64, (1, 2, 4, 8), 512
STEPS, LR, SEED, SOLVED = 1000, 4e-3, 0, 0.995
SLOW = 3  # models with mamba2 get so many times the steps: after STEPS they have hardly begun
TIMES = (1, 2, 4, 8, 16)
GUESS, LEARNT = 1 / PAIRS[-1], 0.5  # any value of the row; an accuracy that only retrieval gives
BLOCK, BLOCKS, HEADS = 8, 4, 4
WINDOWS = {
    "kernel_size": BLOCK, "kernel_stride": BLOCK // 2, "block_size": BLOCK, "top_k": BLOCKS, "init_blocks": 0,
    "window": BLOCK,
}  # fmt: skip
# mixers whose keys may be rotated, then those where there is nothing to choose
ROTATED: dict[str, dict[str, Any]] = {
    "attention": {"num_heads": HEADS},
    "moba": {"num_heads": HEADS, "block_size": BLOCK, "top_k": BLOCKS},
    "nsa": {"num_heads": HEADS, **WINDOWS, "local_blocks": 1},
    "infllm_v2": {"num_heads": HEADS, **WINDOWS, "dense_len": 0},
    "seer_attention": {"num_heads": HEADS, "block_size": BLOCK, "top_k": BLOCKS, "gate_dim": 32},
    "dsa": {"num_heads": HEADS, "top_k": BLOCK * BLOCKS},
    "landmark": {"num_heads": HEADS, "block_size": BLOCK, "top_k": BLOCKS},
}  # fmt: skip
MAMBA2 = {"state_dim": 16, "head_dim": 32}
HSA = {"num_heads": HEADS, "chunk_size": BLOCK, "top_k": BLOCKS, "retrieval_dim": 32}
OTHERS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "hsa": [("hsa", HSA)],
    "mamba2 + hsa": [("mamba2", MAMBA2), ("hsa", HSA)],
    "mamba2": [("mamba2", MAMBA2)],
    "window_global": [
        ("window_global", {"num_heads": HEADS, "window": 2 * BLOCK, "num_globals": 2 * BLOCK, "chunk_size": BLOCK})
    ],
}


class WithLandmarks(nn.Module):
    """A learned token behind every `size - 1`, for a mixer that takes every size-th as the landmark of a section."""

    def __init__(self, mixer: nn.Module, dim: int, size: int):
        super().__init__()
        self.mixer, self.size = mixer, size
        self.landmark = nn.Parameter(torch.randn(dim))

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        place = torch.arange(T)
        place = place + place // (self.size - 1)
        longer = self.landmark.expand(B, int(place[-1]) + 1, D).clone()
        longer[:, place] = x
        return self.mixer(longer)[:, place]


def subjects() -> dict[tuple[str, str], list[tuple[str, dict[str, Any]]]]:
    """(name, positions): the mixers of a model."""
    rotated = {
        (name, "rotary" if rope else "none"): [(name, {**options, "rope": rope})]
        for name, options in ROTATED.items()
        for rope in (True, False)
    }
    return rotated | {(name, "rotary" if name == "window_global" else "none"): m for name, m in OTHERS.items()}


def build(mixers: list[tuple[str, dict[str, Any]]]) -> Probe:
    model = Probe(DIM, VOCAB, mixers, SEED)
    if mixers[-1][0] == "landmark":
        model.mixers[-1] = WithLandmarks(model.mixers[-1], DIM, BLOCK)
    return model


def run(report: Report) -> Result:
    tasks = [make_task(DataSection(source="needle", num_pairs=n), LENGTH, VOCAB) for n in PAIRS]
    streams = [batches(task, TOKENS // LENGTH, SEED) for task in tasks]
    seen = [next(streams[i % len(PAIRS)]) for i in range(report.steps(SLOW * STEPS))]
    fresh = {}
    for times in TIMES:
        task = make_task(DataSection(source="needle", num_pairs=PAIRS[-1]), times * LENGTH, VOCAB)
        fresh[times * LENGTH] = next(batches(task, 64, seed=10**6))
    wanted = subjects()
    if report.tiny:
        wanted = {key: wanted[key] for key in (("attention", "rotary"), ("hsa", "none"), ("landmark", "none"))}
        fresh = {n: (inputs[:2], labels[:2]) for n, (inputs, labels) in fresh.items()}
    rows = []
    for (name, positions), mixers in wanted.items():
        model = build(mixers)
        steps = report.steps(SLOW * STEPS if mixers[0][0] == "mamba2" else STEPS)
        bar = report.bar(f"{name} ({positions})", steps)
        done = train(
            model, seen, bar, steps=steps, lr=LR, every=100, score=lambda m=model: accuracy(m, *fresh[LENGTH]),
            solved=SOLVED,
        )  # fmt: skip
        scores = {str(n): round(accuracy(model, *part), 4) for n, part in fresh.items()}
        rows.append(
            {
                "mixer": name, "positions": positions, **scores, "steps": done.steps, "cpu_seconds": done.cpu_seconds,
                "mixers": mixers,
            }
        )  # fmt: skip
    rows.sort(key=lambda r: (-r[str(TIMES[-1] * LENGTH)], -r[str(LENGTH)]))
    columns = [
        ("mixer", "mixer", ""), ("positions", "positions", ""),
        *((str(t * LENGTH), f"{t * LENGTH} tokens ({t}x)", ".1%") for t in TIMES),
        ("steps", "steps", ","), ("cpu_seconds", "CPU s", ".1f"),
    ]  # fmt: skip
    settings = {
        "seed": SEED, "dim": DIM, "vocabulary": VOCAB, "needles in training": PAIRS, "tokens of a row": LENGTH,
        "tokens a batch": TOKENS, "steps at most": STEPS, "with mamba2": SLOW * STEPS, "lr": LR,
        "stop at accuracy": SOLVED, "block": BLOCK, "blocks read": BLOCKS,
    }  # fmt: skip
    return Result(columns, rows, judge(rows), settings)


def judge(rows: list[dict[str, Any]]) -> list[Verdict]:
    """What the figures say."""
    near, far = str(LENGTH), str(TIMES[-1] * LENGTH)
    by = {(r["mixer"], r["positions"]): r for r in rows}

    def kept(row: dict[str, Any]) -> float:
        """Share of what is above guessing that is left at the longest rows; 0 where nothing was learnt."""
        return (row[far] - GUESS) / (row[near] - GUESS) if row[near] > LEARNT else 0.0

    def told(row: dict[str, Any]) -> str:
        return f"{row['mixer']} {row[near]:.1%} at {near}, {row[far]:.1%} at {far}"

    found = []
    for name in dict.fromkeys(name for name, _ in by if name not in ("attention", "mamba2")):
        row = max((r for (mixer, _), r in by.items() if mixer == name), key=lambda r: (r[near] > LEARNT, r[far]))
        share = kept(row)
        verdict = NOT_HERE if row[near] <= LEARNT or 0.5 <= share < 0.9 else SHOWS if share >= 0.9 else OPPOSITE
        claim = f"{name} keeps its accuracy at {TIMES[-1]} times the training length."
        unlearnt = f" It did not learn the task in {row['steps']:,} steps." if row[near] <= LEARNT else ""
        found.append(Verdict(claim, verdict, f"Positions {row['positions']}: {told(row)}.{unlearnt}"))
    dense, hsa = by.get(("attention", "none")), by.get(("hsa", "none"))
    if dense and hsa:
        gain = kept(hsa) - kept(dense)
        verdict = SHOWS if gain > 0.02 else OPPOSITE if gain < -0.02 else NOT_HERE
        claim = "Chunks that are retrieved generalise better than dense attention without positions."
        found.append(Verdict(claim, verdict, f"{told(hsa)}; {told(dense)}."))
    pairs = {n: (by[n, "rotary"], by[n, "none"]) for n in ROTATED if (n, "rotary") in by and (n, "none") in by}
    if pairs:
        better = [n for n, (rotary, none) in pairs.items() if none[far] > rotary[far] + 0.05]
        worse = [n for n, (rotary, none) in pairs.items() if none[far] < rotary[far] - 0.05]
        verdict = SHOWS if len(better) > 2 * len(worse) else OPPOSITE if len(worse) > len(better) else NOT_HERE
        claim = "It is rotary positions that do not generalise: without them the same mixer finds more."
        evidence = (
            f"At {far} tokens {len(better)} of {len(pairs)} mixers find over 5 points more without, {len(worse)} less"
        )
        found.append(Verdict(claim, verdict, f"{evidence}: {', '.join(better)}."))
    return found


def draw(result: Result, figure: Any) -> None:
    axes = figure.subplots(1, 2, sharey=True)
    names = list(dict.fromkeys(r["mixer"] for r in result.rows))
    for which, title, panel in (("none", "without positions", axes[0]), ("rotary", "rotary positions", axes[1])):
        for row in result.rows:
            if row["positions"] == which:
                look = style(names.index(row["mixer"]))
                values = [100 * row[str(t * LENGTH)] for t in TIMES]
                panel.plot([t * LENGTH for t in TIMES], values, label=row["mixer"], linewidth=1.2, markersize=5, **look)
        panel.set_xscale("log", base=2)
        panel.set_xticks([t * LENGTH for t in TIMES], [f"{t * LENGTH}\n{t}x" for t in TIMES])
        panel.set_xlabel("tokens, times the training length")
        panel.set_title(title, fontsize=10)
        panel.axhline(100 * GUESS, color="black", linestyle=":", linewidth=1)
        panel.grid(alpha=0.3)
    handles = {text: line for panel in axes for line, text in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=6, fontsize=8)
    axes[0].set_ylabel("right answers, % (dotted: any value of the row)")
