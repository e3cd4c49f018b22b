"""How much of a run's time is the model's own? `zoo train` against a bare loop over the same model.

    python tools/overhead.py [--steps 120]     # docs/measured/overhead.md and overhead.json

Both run in one process and take turns, a step of one and then a step of the other, so that what else the machine does
falls on both alike. The bare loop is what one writes by hand: batch, forward, cross-entropy, backward, clipping, AdamW
(fused, two groups), the schedule. `zoo train` does all that a run does by default: its own random numbers in each step,
the judge of its loss and gradients, metrics and their file, the console, MFU and memory, and the look at every node in
each 50th step. Held-out evaluations and checkpoints are extra work that a configuration asks for at its own pace; what
one costs stands beside it. Both learn the same: their losses are compared.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
MODELS: dict[str, tuple[Any, list[str]]] = {
    "hydra_small": ("hydra_small", []),
    "llama": ("llama_1b", ["dim=128", "vocab_size=257", "define.layer[0].attention={num_heads: 4, num_kv_heads: 2}",
                           "define.layer[1].swiglu={hidden_dim: 384}", "trunk[0].repeat=4"]),
    "mamba2": ("mamba2_130m", ["dim=128", "vocab_size=257", "trunk[0].repeat=4"]),
}  # fmt: skip
RECIPE = ["train.batch_size=4", "train.seq_len=256", "train.eval_every=0", "train.checkpoint_every=0",
          "data.source=python-stdlib", "data.tokenizer=bytes", "data.heldout_bytes=4096"]  # fmt: skip
FIRST = 5  # steps that are not counted


class Bare:
    """A training loop, written by hand."""

    def __init__(self, document: dict[str, Any], rows: Any):
        import zoo
        from zoo.sections import TrainSection
        from zoo.train.optim import groups

        self.train, self.rows = TrainSection.from_mapping(document["train"]), rows
        self.model: Any = zoo.build(document)
        self.model.init_weights(self.train.seed)
        self.model.train()
        named = dict(self.model.named_parameters())
        members = [{"params": [named[n] for n in g.names], **g.options} for g in groups(self.model, self.train)]
        self.optimizer = torch.optim.AdamW(members, fused=True)
        warmup, steps, least = (
            min(self.train.warmup_steps, self.train.steps),
            self.train.steps,
            self.train.min_lr_factor,
        )
        assert self.train.schedule == "cosine" and self.train.accumulation == 1

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            done = (step - warmup) / max(1, steps - warmup)
            return least + (1 - least) * 0.5 * (1 + math.cos(math.pi * done))

        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)
        self.step_number = 0

    def batch(self) -> tuple[Tensor, Tensor]:
        from zoo.train.loader import batch

        size = self.train.batch_size
        made = batch(self.rows, self.step_number * size, size)
        return made.inputs, made.labels

    def step(self) -> float:
        inputs, labels = self.batch()
        self.step_number += 1
        self.optimizer.zero_grad()
        logits = self.model(inputs)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.train.grad_clip, foreach=True)
        self.optimizer.step()
        self.schedule.step()
        return loss.item()


def measure(name: str, steps: int) -> dict[str, Any]:
    """Seconds and losses of the steps of both."""
    from omegaconf import OmegaConf

    import zoo
    from zoo.train import titan
    from zoo.train.run import train

    config, changes = MODELS[name]
    loaded = zoo.load_config(config, [*changes, *RECIPE, f"train.steps={steps}"])
    document: Any = OmegaConf.to_container(loaded, resolve=True)
    ours: list[float] = []
    bare: list[float] = []
    losses: list[tuple[float, float]] = []
    saving: list[float] = []
    fit = titan.fit

    def taking_turns(job: Any) -> Any:
        loop, told = Bare(document, job.rows), job.on_step
        since = [0.0]

        def on_step(record: dict[str, Any]) -> None:
            told(record)
            middle = time.perf_counter()
            loss = loop.step()
            end = time.perf_counter()
            ours.append(middle - since[0])
            bare.append(end - middle)
            losses.append((record["loss"], loss))
            since[0] = time.perf_counter()

        job.on_step = on_step
        made = fit(job)
        saving.append(time.perf_counter() - since[0])  # the checkpoint behind the last step
        return made

    titan.fit = taking_turns
    try:
        with tempfile.TemporaryDirectory() as folder:
            result = train(document, out=Path(folder) / "run")
    finally:
        titan.fit = fit
    tokens = document["train"]["batch_size"] * document["train"]["seq_len"]
    mine, its = ours[FIRST:], bare[FIRST:]
    return {
        "model": name,
        "parameters": result.parameters,
        "tokens_per_step": tokens,
        "steps": len(mine),
        "zoo_tokens_per_second": tokens * len(mine) / sum(mine),
        "bare_tokens_per_second": tokens * len(its) / sum(its),
        "ratio": sum(its) / sum(mine),
        "ratio_of_medians": statistics.median(its) / statistics.median(mine),
        "milliseconds_more_a_step": 1e3 * (sum(mine) - sum(its)) / len(mine),
        "checkpoint_seconds": saving[0],
        "largest_relative_difference_of_losses": max(abs(a - b) / abs(b) for a, b in losses),
    }


def page(found: list[dict[str, Any]], machine: dict[str, Any]) -> str:
    """docs/measured/overhead.md"""
    said = (__doc__ or "").split("\n\n")[-1].strip()
    lines = [
        "# Overhead of a run",
        "",
        f"Written by `python tools/overhead.py`. {said}",
        "",
        "| model | parameters | zoo train, tokens/s | bare loop, tokens/s | ratio | of medians | more a step, ms "
        "| a checkpoint, s | losses differ by |",
        "|" + " --- |" * 9,
    ]
    for f in found:
        lines.append(
            f"| {f['model']} | {f['parameters'] / 1e6:.2f} M | {f['zoo_tokens_per_second']:,.0f} "
            f"| {f['bare_tokens_per_second']:,.0f} | {f['ratio']:.3f} | {f['ratio_of_medians']:.3f} "
            f"| {f['milliseconds_more_a_step']:.1f} | {f['checkpoint_seconds']:.2f} "
            f"| {f['largest_relative_difference_of_losses']:.0e} |"
        )
    lines += [
        "",
        f"{found[0]['steps']} steps of {found[0]['tokens_per_step']} tokens in float32 on {machine['device']}, "
        f"{machine['threads']} thread(s), torch {machine['versions']['torch']}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="*", help="some of them; then nothing is written")
    parser.add_argument("--steps", type=int, default=120)
    args = parser.parse_args()
    from zoo.bench.machine import describe

    machine, found = describe("cpu"), []
    for name in args.models or list(MODELS):
        found.append(measure(name, args.steps))
        print(json.dumps(found[-1]), file=sys.stderr)
    text = page(found, machine)
    print(text)
    if not args.models:
        folder = ROOT / "docs/measured"
        (folder / "overhead.md").write_text(text, encoding="utf-8")
        (folder / "overhead.json").write_text(json.dumps({"machine": machine, "models": found}, indent=1) + "\n")
    return int(min(f["ratio"] for f in found) < 0.95)


if __name__ == "__main__":
    sys.exit(main())
