"""Is the memory that `zoo plan` foretells the memory that a run takes? Two real ranks of hydra_hybrid, shrunk.

    python tools/plan_memory.py                # docs/measured/plan_memory.md and plan_memory.json
    python tools/plan_memory.py tp=2           # one layout

Two processes (gloo) train two steps with the trainer of `zoo train`. What they take is the peak of their resident
memory over what it was after they had trained a model a thousandth of the size under the same layout: libraries and
compiled kernels do not count. Memory that is freed goes back to the system at once, so what a peak shows was in use.
The larger of the two ranks stands beside the largest rank of the plan.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SHRUNK = ("vocab_size=2048", "define.facts.product_key.num_keys=64", "train.curriculum=[]", "train.groups=[]")
TINY = (
    "dim=64",
    "train.batch_size=2",
    "define.experts.chunk_moe.hidden_dim=64",
    "define.facts.product_key.value_dim=16",
)
REAL = ("dim=512", "train.batch_size=4", "define.experts.chunk_moe.hidden_dim=340")
RECIPE = ("train.seq_len=256", "train.steps=2", "train.eval_every=0", "train.checkpoint_every=0", "data.source=mqar")
LAYOUTS = {
    "FSDP 2": "dp_shard=2",
    "TP 2": "tp=2",
    "FSDP 2, activations computed again": "dp_shard=2 train.activation_checkpoint=full",
    "DDP 2": "dp_replicate=2",
}
OFF = 0.1  # share by which a plan may be wrong
CLUSTERS = (("64", "tp=8"), ("64", ""), ("512", "tp=8 dp_replicate=8"), ("512", ""))


def words_of(layout: str) -> tuple[str, ...]:
    """Overrides of a layout."""
    return tuple(w if "." in w.split("=")[0] else f"parallel.{w}" for w in layout.split())


# --------------------------------------------------------------------------------------------- a rank
def memory(key: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(key)))


def train(words: tuple[str, ...]) -> int:
    """Train here, as one of the ranks that torchrun started; the peak of memory until the last step was done."""
    from omegaconf import OmegaConf

    import zoo
    from zoo.sections import DataSection, ParallelSection, TrainSection
    from zoo.train import titan
    from zoo.train.job import Job
    from zoo.train.prepare import prepare

    document: Any = OmegaConf.to_container(zoo.load_config("hydra_hybrid", [*SHRUNK, *RECIPE, *words]), resolve=True)
    section = TrainSection.from_mapping(document["train"])
    rows = prepare(DataSection.from_mapping(document["data"]), section, document, None).rows
    parallel = ParallelSection.from_mapping(document["parallel"])
    peaks: list[int] = []
    titan.fit(
        Job(
            lambda device: zoo.build(document, device=device),
            section,
            rows,
            parallel,
            on_step=lambda record: peaks.append(memory("VmHWM")),
        )
    )
    return peaks[-1]


def rank(out: str, words: tuple[str, ...]) -> None:
    """Write down by how much memory rose."""
    import torch

    torch.distributed.init_process_group("gloo")  # one for both
    train((*TINY, *words))
    gc.collect()
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak
    peak = train((*REAL, *words))
    Path(f"{out}.{os.environ['RANK']}").write_text(str(peak - before))


# ---------------------------------------------------------------------------------------------- the table
def resident(words: tuple[str, ...], folder: Path) -> int:
    """What the larger of two ranks took."""
    # every block of 64 KiB and more comes from the system by itself and goes back to it
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    out = folder / "rose"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    done = subprocess.run([*command, "--rank", str(out), *words], capture_output=True, text=True, env=env, cwd=ROOT)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return max(int(Path(f"{out}.{r}").read_text()) for r in range(2))


def planned(words: tuple[str, ...], gpus: str = "2", gpu: str = "cpu") -> dict[str, Any]:
    """The document of `zoo plan`."""
    command = [sys.executable, "-m", "zoo", "plan", "hydra_hybrid", *words, "--gpus", gpus, "--gpu", gpu, "--json"]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout)


def compare(name: str, layout: str, folder: Path) -> dict[str, Any]:
    """A row of the table."""
    words = words_of(layout)
    made = planned((*SHRUNK, *RECIPE, *REAL, *words))
    parts = ("weights", "gradients", "optimizer", "gathered", "activations", "loss")
    stage = made["stages"][0]
    row: dict[str, Any] = {"layout": name, **{p: stage[p] for p in parts}, "planned": made["peak"]}
    row["resident"] = resident(words, folder)
    return row | {"ratio": row["planned"] / row["resident"]}


def dry_runs() -> list[dict[str, Any]]:
    """Seconds of `zoo plan hydra_hybrid`, from the start of the process to its end."""
    found = []
    for gpus, layout in CLUSTERS:
        begin = time.perf_counter()
        made = planned((f"train.batch_size={gpus}", *words_of(layout)), gpus, "H100")
        seconds = time.perf_counter() - begin
        what = layout.replace("=", " ") or "a proposal"
        found.append({"ranks": int(gpus), "layout": what, "peak": made["peak"], "seconds": seconds})
    return found


def page(rows: list[dict[str, Any]], runs: list[dict[str, Any]], machine: dict[str, Any]) -> str:
    """docs/measured/plan_memory.md"""
    said = (__doc__ or "").split("\n\n")[-1].strip()
    parts = [k for k in rows[0] if k not in ("layout", "ratio")]
    text = ["# Planned and real memory", "", f"Written by `python tools/plan_memory.py`. {said}", ""]
    text += [f"| MiB | {' | '.join(parts)} | planned / resident |", "|" + " --- |" * (len(parts) + 2)]
    for r in rows:
        text.append(f"| {r['layout']} | {' | '.join(f'{r[p] / 2**20:.0f}' for p in parts)} | {r['ratio']:.2f} |")
    for r in rows:
        if abs(r["ratio"] - 1) > OFF:
            more = (r["resident"] - r["planned"]) / 2**20
            text += ["", f"Not explained yet: {r['layout']} takes {more:+.0f} MiB beside the plan."]
    text += [
        "",
        f"Overrides: `{' '.join((*SHRUNK, *REAL, *RECIPE))}`.",
        "",
        "`zoo plan hydra_hybrid`, without any GPU:",
    ]
    text += ["", "| ranks | layout | memory of a rank, GiB | seconds |", "| --- | --- | --- | --- |"]
    text += [f"| {r['ranks']} | {r['layout']} | {r['peak'] / 2**30:.2f} | {r['seconds']:.1f} |" for r in runs]
    text += ["", f"{machine['device']}, {machine['processors']} processors, torch {machine['versions']['torch']}."]
    return "\n".join(text) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("layout", nargs="*", help="one layout, as in dp_shard=2; then nothing is written")
    args = parser.parse_args()
    layouts = {" ".join(args.layout): " ".join(args.layout)} if args.layout else LAYOUTS
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, layout in layouts.items():
            rows.append(compare(name, layout, Path(folder)))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    if not args.layout:
        from zoo.bench.machine import describe

        machine, runs = describe("cpu"), dry_runs()
        text = page(rows, runs, machine)
        print(text)
        measured = ROOT / "docs/measured"
        (measured / "plan_memory.md").write_text(text, encoding="utf-8")
        found = {"machine": machine, "layouts": rows, "dry_runs": runs}
        (measured / "plan_memory.json").write_text(json.dumps(found, indent=1) + "\n")
    return int(any(abs(r["ratio"] - 1) > OFF for r in rows))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        rank(sys.argv[2], tuple(sys.argv[3:]))
    else:
        sys.exit(main())
