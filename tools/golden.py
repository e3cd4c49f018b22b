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
    if "decode" in model.modes:
        tokens, mode = SEQ, "decode"
        infer = zoo.estimate(model, batch_size=BATCH, seq_len=1, context_len=SEQ - 1, mode="decode")
    else:
        tokens, mode = model.options.num_tokens, "prefill"
        infer = zoo.estimate(model, batch_size=BATCH, seq_len=tokens, mode="prefill")
    train = zoo.estimate(model, batch_size=BATCH, seq_len=tokens, mode="train")
    lines = [
        f"{name}: batch {BATCH}, {tokens} tokens",
        f"params {train.params:,}  active {train.active_params:,}",
        f"train flops {train.flops:,}  {mode} flops {infer.flops:,}  state bytes {infer.state_bytes:,}",
        "",
        f"{'node':<40} {'block':<20} {'params':>15} {'train flops':>20} {'state bytes':>15}",
    ]
    lines += [
        f"{n.path:<40} {n.block:<20} {n.params:>15,} {n.flops:>20,} {d.state_bytes:>15,}"
        for n, d in zip(train.nodes, infer.nodes, strict=True)
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
