"""A training run that is killed at random moments and resumed until it is done."""

import random
import time
from pathlib import Path

import forked
from tiny_runs import config, history, same, weights

from zoo.train.checkpoints import newest_checkpoint

SECONDS_TO_WAIT = 120.0


def run(name: str, source: str, out: str, resume: bool, options: dict) -> None:
    """Train in this process, which may be killed while it does."""
    from zoo.train import prepare
    from zoo.train.run import train

    prepare.SAMPLE_TOKENS = 8
    train(config(name, Path(source), **options), out=out, resume=resume, progress=False)


def killed(name: str, source: Path, out: Path, kills: int, seed: int, options: dict) -> list[dict]:
    """Kill the run in `out` so many times, going on with it each time. What was found after each kill.

    Every other kill is aimed at a moment when a checkpoint is being written, the others fall between a step and the
    next, or whatever is done there.
    """
    rng = random.Random(seed)
    rows = []
    for number in range(kills):
        process = forked.start(run, name, str(source), str(out), out.exists(), options)
        began = time.monotonic()
        aimed = bool(number % 2)
        steps, delay = rng.randint(1, 3), rng.uniform(0.0, 0.02 if aimed else 0.2)
        seen = set(_half(out))
        lines = len(history(out)) if out.exists() else 0
        while process.is_alive() and time.monotonic() - began < SECONDS_TO_WAIT:
            new = [p for p in _half(out) if p not in seen]
            if (aimed and new) or (not aimed and _lines(out) >= max(lines, 1) + steps):
                break
            time.sleep(0.001)
        time.sleep(delay)
        process.kill()
        process.join()
        told = []
        rows.append(
            {
                "kill": number + 1,
                "saving in the background": options.get("checkpoint_async", False),
                "steps done": max((r["step"] for r in history(out)), default=0),
                "while saving": bool(_half(out)),
                "finished before": process.exitcode == 0,
                "goes on from": newest_checkpoint(out, told.append) or 0,
                "passed over": len(told),
            }
        )
    return rows


def _half(out: Path) -> list[Path]:
    return list((out / "checkpoint").glob(".step-*"))


def _lines(out: Path) -> int:
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def equal(a: Path, b: Path) -> bool:
    """Whether two runs wrote the same numbers, bit for bit."""
    texts = [(folder / "evaluation.json").read_text() for folder in (a, b)]
    return history(a) == history(b) and same(weights(a), weights(b)) and texts[0] == texts[1]
