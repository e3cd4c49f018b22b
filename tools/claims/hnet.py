"""H-Net's boundaries drawn over text.

Claim: dynamic chunking, learned with the model on raw bytes, finds units that mean something: chunks begin where words
begin, and their mean length settles near the aimed one (arXiv:2507.07955).

Measured: a small H-Net of one stage on bytes of the Python library's sources: two Mamba-2 layers, the chunker, two
transformer layers on the chunks, two Mamba-2 layers. On held-out text: how often a byte begins a chunk, by what the
byte is, against the same rate everywhere (chance); and the bytes of a chunk over training. The picture shows the
held-out lines with the most words and where the model cuts them.

Refuted if words' first bytes begin chunks no more often than other bytes, or if the chunks' length leaves the aim by
more than a fifth.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

import zoo
from claims._text import VOCAB, Text
from claims.common import COLORS, NOT_HERE, OPPOSITE, SHOWS, Report, Result, Verdict, train
from zoo.graph.dynamic_chunks import DynamicChunks

DIM, WIDTH, LENGTH, BATCH, HELDOUT, RATIO = 64, 96, 256, 4, 32768, 6.0
STEPS, LR, SEED, EVERY = 800, 3e-3, 0, 5
LINES, WIDE = 10, 80  # of the picture: lines, and bytes in the longest
KINDS = ("first of a word", "second of a word", "later in a word", "white space", "other")
CONFIG: dict[str, Any] = {
    "dim": DIM,
    "vocab_size": VOCAB,
    "tie_embeddings": False,
    "define": {
        "bytewise": {"repeat": 2, "of": {"mamba2": {"state_dim": 16}}},
        "layer": [{"attention": {"num_heads": 4}}, {"swiglu": {"hidden_dim": 256}}],
    },
    "trunk": [
        {
            "hierarchy": {
                "chunker": {"dynamic_chunks": {"width": WIDTH, "ratio": RATIO}},
                "encoder": "bytewise",
                "of": {"repeat": 2, "of": "layer"},
                "decoder": "bytewise",
            }
        }
    ],
}


def kinds_of(ids: np.ndarray) -> np.ndarray:
    """The place in KINDS of every byte of a text. Letters, digits and underscores make words."""
    word = np.array([i < 128 and (chr(i).isalnum() or i == ord("_")) for i in range(VOCAB)])[ids]
    before = np.concatenate([[False], word[:-1]])
    earlier = np.concatenate([[False], before[:-1]])
    inside = np.where(before, np.where(earlier, 2, 1), 0)
    return np.where(word, inside, np.where(np.isin(ids, list(b" \t\r\n")), 3, 4))


def wordy(ids: np.ndarray) -> np.ndarray:
    """The LINES lines of a text, none longer than WIDE, that begin the most words."""
    ends = [-1, *np.flatnonzero(ids == ord("\n"))]
    begun = np.cumsum(kinds_of(ids) == 0)
    places = [
        (begun[ends[i + LINES]] - begun[ends[i] + 1], ends[i] + 1, ends[i + LINES])
        for i in range(len(ends) - LINES)
        if np.diff(ends[i : i + LINES + 1]).max() <= WIDE
    ]
    _, first, last = max(places)
    return ids[first : last + 1]


def boundaries(model: Any, chunker: DynamicChunks, rows: Tensor) -> np.ndarray:
    """Where chunks begin, [B, T]."""
    seen = []
    hook = chunker.register_forward_pre_hook(
        lambda _, args: seen.append(chunker.boundaries(args[0], args[3], args[5]) >= 0.5)
    )
    with torch.no_grad():
        for part in rows.split(32):
            model(part)
    hook.remove()
    return torch.cat(seen).numpy()


def run(report: Report) -> Result:
    text, steps = Text(LENGTH, HELDOUT, tiny=report.tiny), report.steps(STEPS)
    model = zoo.build(CONFIG, seed=SEED)
    chunker = next(m for m in model.modules() if isinstance(m, DynamicChunks))
    lengths: list[float] = []
    bar = report.bar("H-Net", steps)
    done = train(
        model, text.batches(BATCH, SEED), bar, steps=steps, lr=LR, weight_decay=0.1,
        after_step=lambda step, loss: lengths.append(1 / float(chunker.metrics["chunk_share"])),
    )  # fmt: skip
    shown = wordy(text.heldout.ids.astype(np.int64))
    whole = len(text.heldout.ids) // LENGTH * LENGTH
    ids = text.heldout.ids[:whole].astype(np.int64)
    begins = boundaries(model, chunker, torch.from_numpy(ids).view(-1, LENGTH))
    counted = np.ones_like(begins)
    counted[:, 0] = False  # a row begins a chunk whatever it says
    kinds, begins, counted = kinds_of(ids), begins.flatten(), counted.flatten()
    rate = begins[counted].mean()
    rows = []
    for number, kind in enumerate(KINDS):
        among = counted & (kinds == number)
        rows.append(
            {
                "kind": kind,
                "bytes": round(float(among.sum() / counted.sum()), 4),
                "boundaries": round(float((among & begins).sum() / max((counted & begins).sum(), 1)), 4),
                "rate": round(float(begins[among].mean()), 4) if among.any() else None,
                "against": round(float(begins[among].mean() / rate), 3) if among.any() and rate else None,
            }
        )
    rows.append(
        {
            "kind": "all",
            "bytes": 1.0,
            "boundaries": 1.0,
            "rate": round(float(rate), 4),
            "against": 1.0,
            "chunk_bytes": round(float(1 / max(rate, 1e-9)), 3),
            "bits": round(text.bits(model), 4),
        }
    )
    columns = [
        ("kind", "byte", ""), ("bytes", "share of bytes (chance)", ".1%"),
        ("boundaries", "share of boundaries", ".1%"), ("rate", "begins a chunk", ".1%"),
        ("against", "against chance", ".2f"), ("chunk_bytes", "bytes a chunk", ".1f"),
        ("bits", "held-out bits per byte", ".3f"),
    ]  # fmt: skip
    settings = {
        "seed": SEED, "config": CONFIG, "steps": steps, "bytes of a row": LENGTH, "batch": BATCH, "lr": LR,
        "held-out bytes": text.heldout_bytes, "parameters": sum(p.numel() for p in model.parameters()),
    }  # fmt: skip
    series = {
        "every": EVERY,
        "chunk_bytes": [round(float(np.mean(lengths[i : i + EVERY])), 3) for i in range(0, steps, EVERY)],
        "cpu_seconds": done.cpu_seconds,
        "text": shown.tolist(),
        "begins": np.flatnonzero(boundaries(model, chunker, torch.from_numpy(shown)[None])).tolist(),
    }
    return Result(columns, rows, judge(rows), settings, series)


def judge(rows: list[dict[str, Any]]) -> list[Verdict]:
    """What the figures say."""
    first, whole = rows[0], rows[-1]
    against, length = first["against"] or 0.0, whole["chunk_bytes"]
    return [
        Verdict(
            "Chunks begin where words begin.",
            SHOWS if against > 1.5 else OPPOSITE if against < 1 / 1.5 else NOT_HERE,
            f"{first['boundaries']:.1%} of the boundaries stand before a word, which {first['bytes']:.1%} of the bytes "
            f"begin: {against:.1f} times chance.",
        ),
        Verdict(
            f"A chunk has about {RATIO:g} bytes, as the ratio loss aims at.",
            SHOWS if abs(length / RATIO - 1) < 0.2 else NOT_HERE,
            f"{length:.1f} bytes on held-out text, which takes {whole['bits']:.2f} bits a byte.",
        ),
    ]


def draw(result: Result, figure: Any) -> None:
    figure.set_size_inches(8, 5.2)
    panels = figure.subplot_mosaic([["length", "kinds"], ["text", "text"]], height_ratios=[3, 2])
    axes, values = panels["length"], result.series["chunk_bytes"]
    axes.plot(result.series["every"] * (np.arange(len(values)) + 0.5), values, color=COLORS[0], linewidth=0.9)
    axes.axhline(RATIO, color="black", linestyle="--", linewidth=1, label="aim of the ratio loss")
    axes.set_ylim(0, min(2 * RATIO, max(*values, RATIO)) + 1)
    axes.set_xlabel("step")
    axes.set_ylabel("bytes a chunk")
    axes.legend(fontsize=8)
    axes = panels["kinds"]
    *kinds, whole = result.rows
    axes.barh([r["kind"] for r in kinds][::-1], [100 * (r["rate"] or 0) for r in kinds][::-1], color=COLORS[0])
    axes.axvline(100 * whole["rate"], color="black", linestyle="--", linewidth=1, label="chance")
    axes.legend(fontsize=7, loc="lower right")
    axes.set_xlabel("of such bytes begin a chunk, %")
    _draw_text(panels["text"], result.series["text"], set(result.series["begins"]))


def _draw_text(axes: Any, ids: list[int], begins: set[int]) -> None:
    """Bytes in their lines, with a mark before each that begins a chunk."""
    column = line = 0
    for place, byte in enumerate(ids):
        if place in begins:
            axes.plot([column, column], [line - 0.42, line + 0.42], color=COLORS[1], linewidth=1.3)
        if 32 < byte < 127:
            axes.text(column + 0.5, line, chr(byte), family="monospace", fontsize=9, ha="center", va="center")
        column += 1
        if byte == ord("\n"):
            column, line = 0, line + 1
    axes.set_xlim(-0.5, WIDE + 0.5)
    axes.set_ylim(line + 0.8, -0.8)
    axes.axis("off")
