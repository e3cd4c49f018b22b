"""Do layouts change what a model learns? Losses of short runs on several processes against those of one process.

    python tools/parity.py                     # all models and layouts, a table in docs/measured/parity.md
    python tools/parity.py mor_small tp=2      # one model, one layout

Every run makes 10 steps in float32 on CPU processes (gloo) from the same seed. A cell is the largest relative
difference of a loss from that of one process which takes the rows in as many pieces; or why the layout is refused.
Embedding and head have weights of their own (a pipeline cannot share them), and the vision model no stochastic depth,
which each rank draws for its own rows.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

LAYOUTS = {
    "FSDP 2": "dp_shard=2",
    "HSDP 2x2": "dp_replicate=2 dp_shard=2",
    "TP 2": "tp=2",
    "PP 2": "pp=2",
    "CP 2": "cp=2",
    "EP 2": "ep=2",
    "FSDP 2 x TP 2": "dp_shard=2 tp=2",
}
MODELS = {
    "hydra_small": ("hydra_small", []),
    "llama": ("llama_1b", ["dim=64", "vocab_size=257", "define.layer[0].attention={num_heads: 4, num_kv_heads: 2}",
                           "define.layer[1].swiglu={hidden_dim: 128}", "trunk[0].repeat=4"]),
    "mamba2": ("mamba2_130m", ["dim=64", "vocab_size=257", "trunk[0].repeat=4"]),
    "gated-deltanet hybrid": ({"name": "hybrid", "dim": 64, "vocab_size": 257, "trunk": [
        {"repeat": 3, "of": [{"gated_deltanet": {"num_heads": 4}}, "swiglu"]},
        [{"attention": {"num_heads": 4}}, "swiglu"]]}, []),
    "mixture of experts": ("mixtral_tiny", ["dim=64"]),
    "MoR": ("mor_small", ["dim=64"]),
    "ViT": ("vit_small", ["residual.drop_path=0"]),
}  # fmt: skip
SHORT = [
    "train.steps=10",
    "train.batch_size=8",
    "train.eval_every=0",
    "train.checkpoint_every=0",
    "train.warmup_steps=50",
]
UNTIED = "tie_embeddings=false"  # a pipeline cannot share one matrix between its ends


def losses(model: str, layout: str, pieces: int = 1) -> list[float] | str:
    """Of each step; or the reason why the layout is refused. Every process calls it alike."""
    import zoo
    from zoo.parallel.layout import check
    from zoo.sections import DataSection, ParallelSection, TrainSection
    from zoo.train import titan
    from zoo.train.job import Job
    from zoo.train.prepare import prepare

    config, changes = MODELS.get(model, (model, []))
    more = [] if model == "ViT" else [UNTIED, "train.seq_len=64"]
    given = [f"parallel.{part}" for part in layout.split()]
    loaded = zoo.load_config(config, [*changes, *SHORT, *more, f"train.accumulation={pieces}", *given])
    from omegaconf import OmegaConf

    document = OmegaConf.to_container(loaded, resolve=True)
    train, data = TrainSection.from_mapping(document["train"]), DataSection.from_mapping(document.get("data"))
    parallel = ParallelSection.from_mapping(document.get("parallel"))
    try:
        check(zoo.build(document, device="meta"), parallel, train.seq_len)
    except zoo.ConfigError as error:
        return "; ".join(f"{p.where}: {p.message}" if p.where else p.message for p in error.problems)
    found: list[float] = []
    titan.fit(
        Job(
            build=lambda device: zoo.build(document, device=device), train=train, parallel=parallel,
            rows=prepare(data, train, document, None).rows, on_step=lambda record: found.append(record["loss"]),
        )
    )  # fmt: skip
    return found


def work(jobs: list[list], out: str) -> None:
    """One of the processes of `launch`."""
    import torch

    torch.set_num_threads(1)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        torch.distributed.init_process_group("gloo")  # one for all jobs
    found = []
    for model, layout, pieces in jobs:
        found.append(losses(model, layout, pieces))
        if os.environ.get("RANK", "0") == "0":
            print(f"  {model}: {layout or 'one process'}", file=sys.stderr, flush=True)
            Path(out).write_text(json.dumps(found))


def launch(ranks: int, jobs: list[tuple]) -> list:
    """Results of the jobs on `ranks` processes, which are started once."""
    if not jobs:
        return []
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "out.json")
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
        command = [sys.executable, *torchrun, __file__, "--work", json.dumps(jobs), out]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        return json.loads(Path(out).read_text())


def product(layout: str) -> int:
    """Processes of a layout; experts spread over data-parallel ranks."""
    count = 1
    for part in layout.split():
        _, value = part.split("=")
        count *= int(value)
    return count


def main(names: list[str], layouts: list[str]) -> int:
    cells = [(m, label, spec) for m in names for label, spec in LAYOUTS.items() if not layouts or spec in layouts]
    pieces = {(m, spec): 2 if spec.startswith("pp") else 1 for m, _, spec in cells}
    alone = list(dict.fromkeys((m, "", pieces[m, spec]) for m, _, spec in cells))
    wanted = dict(zip(alone, launch(1, alone), strict=True))
    found: dict = {}
    for ranks in sorted({product(spec) for _, _, spec in cells}):
        jobs = [(m, spec, 1) for m, _, spec in cells if product(spec) == ranks]
        found |= dict(zip(((m, spec) for m, spec, _ in jobs), launch(ranks, jobs), strict=True))
    rows, notes, worst = [], [], 0.0
    for m in names:
        row = []
        for label, spec in LAYOUTS.items():
            got = found.get((m, spec))
            if got is None:
                row.append("")
            elif isinstance(got, str):
                notes.append(f"{m}, {label}: {got}")
                row.append(f"refused ({len(notes)})")
            else:
                reference = wanted[m, "", pieces[m, spec]]
                off = max(abs(a - b) / abs(b) for a, b in zip(got, reference, strict=True))
                worst = max(worst, off)
                row.append(f"{off:.0e}")
        rows.append(f"| {m} | " + " | ".join(row) + " |")
    header = "| | " + " | ".join(LAYOUTS) + " |\n|" + " --- |" * (len(LAYOUTS) + 1)
    text = "\n".join([header, *rows, "", *(f"{i}. {n}" for i, n in enumerate(notes, 1))]) + "\n"
    print(text)
    if names == list(MODELS) and not layouts:
        path = Path(__file__).resolve().parent.parent / "docs/measured/parity.md"
        said = (__doc__ or "").split("\n\n")[-1].strip()
        path.write_text(f"# Layouts against one process\n\nWritten by `python tools/parity.py`. {said}\n\n{text}")
    return int(worst > 1e-4)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(json.loads(sys.argv[2]), sys.argv[3])
    else:
        chosen = [a for a in sys.argv[1:] if "=" not in a]
        sys.exit(main(chosen or list(MODELS), [a for a in sys.argv[1:] if "=" in a]))
