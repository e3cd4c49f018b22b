"""Attention mass recalled against density for the selection policies.

Claim: a few blocks or keys that a cheap estimate chooses hold most of the attention mass, far more than the last tokens
and the first ones: Quest (arXiv:2406.10774), LServe (arXiv:2502.14866), XAttention (arXiv:2503.16428), PBS-Attn
(arXiv:2510.21270) and AnchorAttention (arXiv:2505.23520), whose single keys are to need fewer of them than blocks do.

Measured: a model of two layers with dense attention, trained briefly on the sources of this machine's Python as bytes.
On held-out text the policy is handed queries and keys of each layer, its knob swept; density is the share of earlier
keys that a query reads, recall the share of its attention mass that they hold, both as means over queries of the second
half of a row, heads and layers. Above all stands the choice by true mass, key by key (oracle); below, the first four
keys and the last ones (window). Blocks are of 16 keys.

Refuted if a policy recalls no more than the window at a quarter of the keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

import zoo
from claims.common import NOT_HERE, OPPOSITE, SHOWS, Report, Result, Verdict, style, train
from zoo import registry
from zoo.blocks.selection import Policy
from zoo.sections import DataSection
from zoo.train.corpus import read_corpus

DIM, HEADS, LAYERS, LENGTH, BATCH = 128, 4, 2, 512, 4
STEPS, LR, SEED, ROWS = 1500, 4e-3, 0, 4
BLOCK, SINKS, AT = 16, 4, 0.25
TOP = [1, 2, 3, 4, 6, 8, 12, 16]
KNOBS: dict[str, tuple[str, list[float], dict[str, Any]]] = {
    "quest": ("top_k", TOP, {"block_size": BLOCK}),
    "lserve": ("top_k", TOP, {"block_size": BLOCK, "page_size": BLOCK // 2, "sinks": BLOCK, "window": 2 * BLOCK}),
    "xattention": ("tau", [0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97], {"block_size": BLOCK, "stride": 4}),
    "pbs": ("tau", [0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 0.97], {"block_size": BLOCK, "segment_size": 4 * BLOCK}),
    "anchor": ("theta", [0, 1, 1.5, 2, 2.5, 3, 4, 6], {"block_size": BLOCK, "step": 2, "init": BLOCK}),
}
SHARES = [0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8]


def windows(text: bytes, rows: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of bytes and the byte that follows each, from places drawn at random."""
    data = torch.from_numpy(np.frombuffer(text, dtype=np.uint8).astype(np.int64))
    number = 0
    while True:
        starts = np.random.default_rng([seed, number]).integers(0, len(data) - LENGTH - 1, rows)
        part = torch.stack([data[i : i + LENGTH + 1] for i in starts])
        yield part[:, :-1], part[:, 1:]
        number += 1


class Recorder:
    """In the place of a policy: keeps the queries and keys it is handed, and reads all keys."""

    def __init__(self, policy: Policy):
        self.policy, self.seen = policy, []

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **given: Any) -> Tensor:
        self.seen.append((q.detach().double(), k.detach().double()))
        return self.policy(q, k, v, **given)


def policy_of(name: str, options: dict[str, Any]) -> Policy:
    """A policy for the heads of the model."""
    policy = registry.component("select", {name: options})
    policy.bind(HEADS, HEADS, DIM // HEADS, (DIM // HEADS) ** -0.5)
    return policy


def queries_and_keys(model: Any, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
    """q and k [B, T, H, D] of every layer, after rotation."""
    recorders = []
    for block in [m for m in model.modules() if type(m).__name__ == "Attention"]:
        block.select = Recorder(policy_of("quest", {"top_k": LENGTH}))
        recorders.append(block.select)
    with torch.no_grad():
        model(tokens)
    return [recorder.seen[0] for recorder in recorders]


def masses(q: Tensor, k: Tensor) -> Tensor:
    """Attention weights [B, H, T, T]."""
    scores = torch.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(hidden, float("-inf")).softmax(-1)


def read_by(policy: Policy, q: Tensor, k: Tensor) -> Tensor:
    """Which keys get weight where values tell keys apart, [B, H, T, T]: what a policy really reads, however it says."""
    B, T, H, _ = k.shape
    one_hot = torch.eye(T, dtype=k.dtype)[None, :, None].expand(B, T, H, T)
    with torch.no_grad():
        return (policy(q, k, one_hot) > 0).transpose(1, 2)


def best(mass: Tensor, share: float) -> Tensor:
    """The keys with most mass, a share of those that are visible."""
    rank = mass.argsort(-1, descending=True).argsort(-1)
    visible = torch.arange(1, mass.shape[-1] + 1)[:, None]
    return (rank < (share * visible).ceil()) & (rank < visible)


def window(mass: Tensor, share: float) -> Tensor:
    """The first and the last keys, a share of those that are visible."""
    place = torch.arange(mass.shape[-1])
    ago = place[:, None] - place
    width = (share * (place + 1)).ceil()[:, None] - SINKS
    return ((ago >= 0) & ((ago < width.clamp(min=1)) | (place < SINKS))).expand_as(mass)


def figures(mass: list[Tensor], read: list[Tensor]) -> tuple[float, float]:
    """Density and recall, of queries of the second half."""
    half = LENGTH // 2
    visible = torch.arange(half + 1, LENGTH + 1)
    density = [(r[:, :, half:].sum(-1) / visible).mean().item() for r in read]
    recall = [(m * r)[:, :, half:].sum(-1).mean().item() for m, r in zip(mass, read, strict=True)]
    return float(np.mean(density)), float(np.mean(recall))


def run(report: Report) -> Result:
    corpus = read_corpus(DataSection())
    texts = [b"\n".join(d.text for d in part) for part in (corpus.train, corpus.heldout)]
    attention = {"attention": {"num_heads": HEADS}}
    config = {"dim": DIM, "vocab_size": 256, "trunk": [{"repeat": LAYERS, "of": [attention, "swiglu"]}]}
    model = zoo.build(config, seed=SEED)
    steps = report.steps(STEPS)
    done = train(
        model, windows(texts[0], BATCH, SEED), report.bar("training", steps), steps=steps, lr=LR, weight_decay=0.1
    )
    tokens, _ = next(windows(texts[1], 1 if report.tiny else ROWS, 10**6))
    recorded = queries_and_keys(model, tokens)
    mass = [masses(q, k) for q, k in recorded]
    wanted = [(name, knob, value, rest) for name, (knob, values, rest) in KNOBS.items() for value in values]
    shares = SHARES
    if report.tiny:
        wanted, shares = wanted[::8], shares[::4]
    rows: list[dict[str, Any]] = []
    bar = report.bar("policies", len(wanted) + 2 * len(shares))
    for name, knob, value, rest in wanted:
        policy = policy_of(name, {knob: value, **rest})
        density, recall = figures(mass, [read_by(policy, q, k) for q, k in recorded])
        rows.append({"policy": name, "knob": f"{knob} {value}", "density": density, "recall": recall})
        bar.at(len(rows), f"{name} {knob} {value}: {recall:.1%} in {density:.1%}")
    for name, choose in (("oracle", best), ("window", window)):
        for share in shares:
            density, recall = figures(mass, [choose(m, share) for m in mass])
            rows.append({"policy": name, "knob": f"share {share}", "density": density, "recall": recall})
            bar.at(len(rows), name)
    bar.end()
    for row in rows:
        row.update(density=round(row["density"], 4), recall=round(row["recall"], 4))
    settings = {
        "seed": SEED, "dim": DIM, "heads": HEADS, "layers": LAYERS, "tokens of a row": LENGTH, "rows": ROWS,
        "steps": done.steps, "batch": BATCH, "lr": LR, "last loss": round(done.loss, 3), "sinks of the window": SINKS,
        "options": {name: rest for name, (_, _, rest) in KNOBS.items()}, "corpus": corpus.summary(),
    }  # fmt: skip
    columns = [
        ("policy", "policy", ""),
        ("knob", "knob", ""),
        ("density", "density", ".1%"),
        ("recall", "recall", ".1%"),
    ]
    return Result(columns, rows, judge(rows), settings)


def recall_at(rows: list[dict[str, Any]], name: str, density: float) -> float:
    """Recall of a policy at a density, between the settings that were measured."""
    mine = sorted((r["density"], r["recall"]) for r in rows if r["policy"] == name)
    return float(np.interp(density, [0.0, *(d for d, _ in mine)], [0.0, *(r for _, r in mine)]))


def judge(rows: list[dict[str, Any]]) -> list[Verdict]:
    """What the figures say."""
    names = [n for n in KNOBS if any(r["policy"] == n for r in rows)]
    at = {n: recall_at(rows, n, AT) for n in (*names, "oracle", "window")}
    found = []
    for name in names:
        gain = at[name] - at["window"]
        verdict = SHOWS if gain > 0.01 else OPPOSITE if gain < -0.01 else NOT_HERE
        evidence = (
            f"At {AT:.0%} of the keys {at[name]:.1%}; the window {at['window']:.1%}, the oracle {at['oracle']:.1%}."
        )
        found.append(Verdict(f"{name} recalls more than first and last keys of the same number.", verdict, evidence))
    blocks = [n for n in names if n not in ("anchor", "lserve")]
    if "anchor" in at and blocks:
        top = max(blocks, key=lambda n: at[n])
        gain = at["anchor"] - at[top]
        found.append(
            Verdict(
                "Single keys (anchor) recall more than blocks of the same number of keys.",
                SHOWS if gain > 0.01 else OPPOSITE if gain < -0.01 else NOT_HERE,
                f"At {AT:.0%} of the keys anchor {at['anchor']:.1%}, the best policy of blocks, {top}, {at[top]:.1%}.",
            )
        )
    return found


def draw(result: Result, figure: Any) -> None:
    axes = figure.subplots()
    for number, name in enumerate(dict.fromkeys(r["policy"] for r in result.rows)):
        mine = sorted((r["density"], r["recall"]) for r in result.rows if r["policy"] == name)
        look = {**style(number), "linestyle": "--" if name in ("oracle", "window") else "-"}
        if name in ("oracle", "window"):
            look["color"] = "black"
        axes.plot(*zip(*[(100 * d, 100 * r) for d, r in mine], strict=True), label=name, markersize=4.5, **look)
    axes.set_xlabel("keys read, % of those before the query")
    axes.set_ylabel("attention mass recalled, %")
    axes.set_xlim(0, 100)
    axes.set_ylim(0, 101)
    axes.grid(alpha=0.3)
    axes.legend()
