"""Associative recall (MQAR, arXiv:2312.04927): which mixers find the value that went with a key?

    python tools/recall.py

Trains two-layer models that differ in the mixer only, on the same batches, and prints their accuracy on fresh
samples. linear_attention and gated_deltanet have the same state size. Expected: attention and gated_deltanet
solve the task, linear_attention does not. Takes a few minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from rich.progress import Progress, TextColumn
from torch.nn import functional as F

import zoo
from zoo.sections import DataSection
from zoo.train.synthetic import IGNORE, make_task

VOCAB, DIM, HEADS = 64, 64, 2
MIXERS = {
    "attention": {"num_heads": HEADS},
    "gated_deltanet": {"num_heads": HEADS, "head_dim": DIM // HEADS, "expand_v": 1.0},
    "linear_attention": {"num_heads": HEADS},
}


def batches(task, size: int, seed: int):
    """Endless batches (inputs, labels) [size, T]; batch n is the same in every run."""
    number = 0
    while True:
        samples = [task(np.random.default_rng([seed, number, row])) for row in range(size)]
        inputs, labels = (torch.from_numpy(np.stack(part)).long() for part in zip(*samples, strict=True))
        yield inputs, labels
        number += 1


def accuracy(model, task, rows: int = 512) -> float:
    """Share of scored positions answered right, on samples never trained on."""
    inputs, labels = next(batches(task, rows, seed=10**6))
    with torch.no_grad():
        right = model.eval()(inputs).argmax(-1) == labels
    model.train()
    return right[labels != IGNORE].float().mean().item()


def run(mixer: str, args: argparse.Namespace) -> dict:
    """Train one model; stops early once it answers everything."""
    task = make_task(DataSection(source="mqar", num_pairs=args.pairs), args.seq_len, VOCAB)
    trunk = [{"repeat": 2, "of": {mixer: MIXERS[mixer]}}]
    # tied embeddings keep attention on its plateau ten times longer here
    config = {"dim": DIM, "vocab_size": VOCAB, "trunk": trunk, "tie_embeddings": False}
    model = zoo.build(config, seed=args.seed).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1, (s + 1) / 50))
    state = model.layers[0].init_state(1, args.seq_len).nbytes
    reached, step, start = 0.0, 0, time.time()
    stream = batches(task, args.batch_size, args.seed)
    with Progress(*Progress.get_default_columns(), TextColumn("{task.fields[note]}")) as progress:
        bar = progress.add_task(f"{mixer:<18}", total=args.steps, note="")
        for step in range(1, args.steps + 1):
            inputs, labels = next(stream)
            loss = F.cross_entropy(model(inputs).flatten(0, 1), labels.flatten(), ignore_index=IGNORE)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if step % 50 == 0 or step == args.steps:
                reached = accuracy(model, task)
                progress.update(bar, completed=step, note=f"loss {loss.item():.3f}  accuracy {reached:.1%}")
                if reached >= 0.998:
                    break
    return {
        "mixer": mixer,
        "accuracy": round(reached, 4),
        "steps": step,
        "state_bytes_per_layer": state,
        "params": sum(p.numel() for p in model.parameters()),
        "seconds": round(time.time() - start, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=48)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mixers", nargs="+", choices=MIXERS, default=list(MIXERS))
    parser.add_argument("--json", type=Path, help="also write the results here")
    args = parser.parse_args()
    results = [run(mixer, args) for mixer in args.mixers]
    print(f"\n{'mixer':<18} {'accuracy':>9} {'steps':>6} {'state B/layer':>14} {'params':>9} {'s':>6}")
    for r in results:
        print(
            f"{r['mixer']:<18} {r['accuracy']:>9.1%} {r['steps']:>6} {r['state_bytes_per_layer']:>14,} "
            f"{r['params']:>9,} {r['seconds']:>6}"
        )
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
