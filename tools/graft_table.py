"""What does a trained model lose when other mixers replace its attention, and what does a little teaching bring back?

    python tools/graft_table.py               # all rows, to docs/measured/graft.md
    python tools/graft_table.py gla moba      # these; the others stay where the original and the settings are the same

One small model of attention is trained on the sources of Python (kept in --cache). Then, for each row anew, all its
attention blocks are replaced by zoo.graft: projections of queries, keys, values and outputs are carried over where they
fit, what else a block has is set to where it is near attention, or drawn. `grafted` is the held-out loss before
anything is learnt. Then the new blocks alone are taught by zoo.graft.distill: first each what its predecessor computed,
then all together the logits of the original; batches and steps are the same for all. So this tells how near a block
starts and how fast it follows, and not what it reaches in the end. Attention here looks at places by rotary positions,
mostly at the tokens just before, and a mixer without them cannot start there. Sparse blocks read a part of the keys
only, which is why they lose something even where they keep every weight.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SEQ_LEN, BATCH, HELDOUT, LAYERS = 128, 4, 16384, 3
STEPS, LONG = 60, 600  # of each stage of teaching
LR, GENTLE = 4e-3, 3e-4  # GENTLE: where a sparse block keeps every weight and so begins close to the original
MODEL = {
    "dim": 96, "vocab_size": 257,
    "trunk": [[{"attention": {"num_heads": 3}}, "swiglu"] for _ in range(LAYERS)],  # written out: hybrids keep some
    "train": {"steps": 800, "batch_size": 16, "seq_len": SEQ_LEN, "lr": 4e-3, "eval_every": 0, "checkpoint_every": 0},
}  # fmt: skip
LINEAR = (
    "linear_attention", "based", "retention", "lightning", "simple_gla", "gla", "hgrn2", "deltanet", "gated_deltanet",
    "kda", "rwkv7", "mlstm", "plstm", "mamba", "mamba2", "mamba3", "rg_lru", "lru", "s4d", "hyena",
)  # fmt: skip
SPARSE: dict[str, dict[str, Any]] = {
    "window_global": {"window": 32, "num_globals": 8, "chunk_size": 16},
    "moba": {"block_size": 16, "top_k": 3},
    "block_attention": {"block_size": 16, "num_blocks": 3},
    "seer_attention": {"block_size": 16, "top_k": 3, "gate_dim": 32},
    "infllm_v2": {"kernel_size": 8, "kernel_stride": 4, "block_size": 16, "window": 16, "top_k": 3, "dense_len": 0},
    "landmark": {"block_size": 16, "top_k": 2},
    "nsa": {"kernel_size": 8, "kernel_stride": 4, "block_size": 16, "top_k": 3, "window": 16},
    "hsa": {"chunk_size": 16, "top_k": 3, "retrieval_dim": 32},
}
POLICIES: dict[str, dict[str, Any]] = {
    "quest": {"block_size": 16, "top_k": 3},
    "lserve": {"block_size": 16, "page_size": 8, "top_k": 2, "sinks": 16, "window": 32},
    "xattention": {"block_size": 16, "stride": 8},
    "pbs": {"block_size": 16, "segment_size": 32},
    "anchor": {"block_size": 16, "step": 4, "init": 16, "theta": 2.0},
}
TAUGHT = ("gla", "gated_deltanet", "kda", "mamba2")  # for LONG steps; also where one layer keeps its attention
KEPT = 1
SITES = "attention"
HEAD = ("kind", "block", "options", "grafted", "blocks taught", "model taught", "lr", "of its worth")
LONG_HEAD = (
    "block",
    "attention kept",
    "grafted",
    "blocks taught",
    "model taught",
    "above the original",
    "of its worth",
)


@dataclass(frozen=True)
class Row:
    """A block in the place of the modules that `sites` names, and how long it is taught."""

    kind: str
    block: str
    options: dict[str, Any] = field(default_factory=dict)
    sites: str = SITES
    steps: int = STEPS


def rows() -> dict[str, Row]:
    """The rows of both tables, by their names."""
    found = {name: Row("linear", name) for name in LINEAR}
    found |= {name: Row("sparse", name, options) for name, options in SPARSE.items()}
    found |= {name: Row("sparse", "attention", {"select": {name: options}}) for name, options in POLICIES.items()}
    hybrid = ",".join(f"layers.{n}.items.0.block" for n in range(LAYERS) if n != KEPT)
    found |= {f"{name}-long": Row("long", name, steps=LONG) for name in TAUGHT}
    return found | {f"{name}-hybrid": Row("hybrid", name, sites=hybrid, steps=LONG) for name in TAUGHT}


def original(cache: Path) -> Any:
    """The model of attention: trained once."""
    import zoo
    from zoo.train.run import train

    if not (cache / "model").is_dir():
        train(MODEL, out=cache)
    model = zoo.from_pretrained(cache)
    if {k: model.config.get(k) for k in MODEL} != MODEL:
        raise SystemExit(f"{cache} holds another model: remove it, or give another --cache")
    return model


def silenced(model: Any) -> Any:
    """The model in which attention says nothing."""
    from zoo.graft.plan import matching

    host = copy.deepcopy(model)
    for site in matching(host, SITES):
        host.get_submodule(site).o_proj.weight.detach().zero_()
    return host


def measured(model: Any, lesson: Any, row: Row) -> dict[str, Any]:
    """Held-out loss after grafting, and after each stage of teaching."""
    from zoo.graft import distill, replace

    host = copy.deepcopy(model)
    done = replace(host, row.sites, row.block, **row.options)
    lr, batches = GENTLE if row.kind == "sparse" and "new" not in done.counts() else LR, lesson.batches()
    found: dict[str, Any] = {"tensors": done.counts(), "lr": lr, "grafted": lesson.heldout_loss(host, HELDOUT)}
    distill(done, batches, layer_steps=row.steps, model_steps=0, lr=lr)
    found["blocks taught"] = lesson.heldout_loss(host, HELDOUT)
    distill(done, batches, layer_steps=0, model_steps=row.steps, lr=lr)
    found["model taught"] = lesson.heldout_loss(host, HELDOUT)
    return found


def page(document: Mapping[str, Any]) -> str:
    """docs/measured/graft.md"""
    begun, silent = document["settings"]["original"], document["silenced"]
    lines = [f"| {' | '.join(HEAD)} |", "| --- | --- | --- " + "| ---: " * (len(HEAD) - 3) + "|"]
    long = [f"| {' | '.join(LONG_HEAD)} |", "| --- | --- " + "| ---: " * (len(LONG_HEAD) - 2) + "|"]
    for row in document["rows"].values():
        worth = f"{(silent - row['model taught']) / (silent - begun):.0%}"
        options = json.dumps(row["options"]).translate(str.maketrans("", "", '"{}'))
        losses = [f"{row[k]:.3f}" for k in ("grafted", "blocks taught", "model taught")]
        if row["kind"] in ("linear", "sparse"):
            cells = [row["kind"], row["block"], options, *losses, f"{row['lr']:g}", worth]
            lines.append(f"| {' | '.join(cells)} |")
        else:
            kept = f"layer {KEPT} of 0 to {LAYERS - 1}" if row["kind"] == "hybrid" else "none"
            cells = [row["block"], kept, *losses, f"{row['model taught'] - begun:.3f}", worth]
            long.append(f"| {' | '.join(cells)} |")
    machine = document["machine"]
    size, steps = f"{BATCH} x {SEQ_LEN} tokens", MODEL["train"]["steps"]
    said = f"""# Grafted attention

Written by `python tools/graft_table.py`.

{(__doc__ or "").split(chr(10) * 2)[-1].strip()}

**The original has a held-out loss of {begun:.3f}** nats a byte, on {HELDOUT} bytes in rows of {SEQ_LEN}:
{len(document["sites"])} layers of attention and SwiGLU, dimension {MODEL["dim"]}, {document["parameters"] / 1e3:.0f} k
parameters, {steps} steps of training. Where attention says nothing it is {silent:.3f}.
Teaching: {STEPS} steps of each stage, {size} each, learning rate {LR:g}, or {GENTLE:g} where a sparse block
keeps every weight. `of its worth`: of what attention takes off the loss, {silent - begun:.3f}, the part that the
taught model takes off.
"""
    longer = f"""
## Taught for longer

The same with {LONG} steps of each stage, learning rate {LR:g}, from {begun:.3f}: every layer of attention replaced, and
all but one (a hybrid).
"""
    end = f"\n{machine['device']}, {machine['threads']} thread(s), torch {machine['versions']['torch']}, float32.\n"
    return said + "\n" + "\n".join(lines) + "\n" + longer + "\n" + "\n".join(long) + "\n" + end


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("rows", nargs="*", choices=[[], *rows()], metavar="ROW", help="some of them")
    parser.add_argument("--cache", type=Path, default=ROOT / "runs" / "graft_table", help="run folder of the original")
    args = parser.parse_args()
    from zoo.bench.machine import describe
    from zoo.graft.lesson import Lesson
    from zoo.graft.plan import matching
    from zoo.train.tokenizer import ByteTokenizer

    model, lesson = original(args.cache), Lesson(ByteTokenizer(), seq_len=SEQ_LEN, size=BATCH)
    settings = {"model": MODEL, "batch": BATCH, "steps": [STEPS, LONG], "heldout_bytes": HELDOUT, "lr": [LR, GENTLE]}
    document: dict[str, Any] = {
        "machine": describe("cpu"),
        "settings": settings | {"original": lesson.heldout_loss(model, HELDOUT)},
        "parameters": sum(p.numel() for p in model.parameters()),
        "silenced": lesson.heldout_loss(silenced(model), HELDOUT),
        "sites": matching(model, SITES),
    }
    out = ROOT / "docs" / "measured" / "graft.json"
    before: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {"settings": None}
    known = before["rows"] if before["settings"] == document["settings"] else {}
    for name in args.rows or rows():
        found = measured(model, lesson, rows()[name])
        known[name] = asdict(rows()[name]) | found
        print(name, json.dumps(found), file=sys.stderr, flush=True)
        document["rows"] = {name: known[name] for name in rows() if name in known}
        out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        out.with_suffix(".md").write_text(page(document), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
