"""`zoo launch CFG`: how a run is started on several machines; and the processes of `zoo train --nproc`."""

from __future__ import annotations

import logging
import os
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from zoo.cli.options import Config, Overrides

_SLURM = """\
#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={per_node}
#SBATCH --time={time}
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# a process that dies restarts all of them from the newest checkpoint; so does a requeued job
srun torchrun --nnodes={nodes} --nproc-per-node={per_node} --max-restarts={restarts} \\
  --rdzv-id="$SLURM_JOB_ID" --rdzv-backend=c10d --rdzv-endpoint="$first:29500" \\
  -m zoo {command}
"""


def command(
    config: Config,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option("--nodes", min=1, help="Machines.")] = 1,
    gpus: Annotated[int, typer.Option("--gpus-per-node", min=1, help="Processes a machine, one a GPU.")] = 8,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Run folder that all see.")] = None,
    time: Annotated[str, typer.Option("--time", help="Of the job, as Slurm writes it.")] = "24:00:00",
    restarts: Annotated[int, typer.Option("--restarts", min=0, help="After failures, without a new job.")] = 3,
) -> None:
    """Print a Slurm script that trains on several machines; without Slurm, its torchrun line on each of them."""
    from zoo.graph.loader import load_config

    document = load_config(config, overrides or ())
    _check(document, nodes * gpus)
    name = str(document.get("name", "model"))
    words = ["train", config, *(overrides or ()), "--out", str(out or Path("runs") / name)]
    print(
        _SLURM.format(
            name=shlex.quote(name), nodes=nodes, per_node=gpus, time=time, restarts=restarts, command=shlex.join(words)
        ),
        end="",
    )


def several(count: int, words: list[str], document: Any, folder: Path) -> int:
    """Run `zoo WORDS` in `count` processes of this machine and return the exit code."""
    _check(document, count)
    if "--out" not in words and "--resume" not in words:
        words = [*words, "--out", str(folder)]  # each process would find a free folder of its own
    # torchrun would take it for an option of its own
    cut = next(i for i, word in enumerate(words) if word.split("=")[0] == "--nproc")
    words = words[:cut] + words[cut + (1 if "=" in words[cut] else 2) :]
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    # what went wrong the process that failed has said itself, in one sentence
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        run(parse_args(["--standalone", "--nproc-per-node", str(count), "-m", "zoo", *words]))
    except ChildFailedError as error:
        return max(error.get_first_failure()[1].exitcode, 1)
    except (KeyboardInterrupt, SignalException):  # the processes got it too, and keep a checkpoint
        return 130
    return 0


def _check(document: Any, world: int) -> None:
    """Refuse before anything is launched what the graph or the numbers do not allow."""
    import zoo
    from zoo.parallel.layout import check, pieces
    from zoo.sections import DataSection, ParallelSection, TrainSection
    from zoo.train import sequence_chunks

    layout = ParallelSection.from_mapping(document.get("parallel"))
    train, data = TrainSection.from_mapping(document.get("train")), DataSection.from_mapping(document.get("data"))
    pieces(layout, train, world)
    model = zoo.build(document, device="meta")
    check(model, layout, train.seq_len)
    sequence_chunks.check(model, train, layout, data, document.get("distill") is not None)
