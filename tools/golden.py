"""Golden files: what each shipped configuration expands to. `python tools/golden.py` rewrites tests/golden.

A file holds the totals, the nodes with their parameters and FLOPs, and every parameter's shape, so that any change
to any model shows as a diff.
"""

from __future__ import annotations

from pathlib import Path

import zoo
from zoo.graph.loader import config_names

FOLDER = Path(__file__).resolve().parent.parent / "tests" / "golden"
BATCH, SEQ = 1, 1024


def golden_text(name: str) -> str:
    """The golden file of a shipped configuration."""
    model = zoo.build(name, device="meta")
    train = zoo.estimate(model, batch_size=BATCH, seq_len=SEQ, mode="train")
    decode = zoo.estimate(model, batch_size=BATCH, seq_len=1, context_len=SEQ - 1, mode="decode")
    lines = [
        f"{name}: batch {BATCH}, {SEQ} tokens",
        f"params {train.params:,}  active {train.active_params:,}",
        f"train flops {train.flops:,}  decode flops {decode.flops:,}  state bytes {decode.state_bytes:,}",
        "",
        f"{'node':<40} {'block':<20} {'params':>15} {'train flops':>20} {'state bytes':>15}",
    ]
    lines += [
        f"{n.path:<40} {n.block:<20} {n.params:>15,} {n.flops:>20,} {d.state_bytes:>15,}"
        for n, d in zip(train.nodes, decode.nodes, strict=True)
    ]
    lines += ["", "parameters"]
    lines += [f"{n}  {tuple(p.shape)}" for n, p in model.named_parameters()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for stale in {p.stem for p in FOLDER.glob("*.txt")} - set(config_names()):
        (FOLDER / f"{stale}.txt").unlink()
    for config in config_names():
        (FOLDER / f"{config}.txt").write_text(golden_text(config))
        print(config)
