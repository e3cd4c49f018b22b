"""Small training runs, also one that kills itself: `python tests/tiny_runs.py CONFIG TEXTS FOLDER STEP`."""

import copy
import os
import resource
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file

from zoo.train.curve import read_metrics

DENSE = {
    "name": "dense",
    "dim": 16,
    "vocab_size": 257,
    "trunk": [{"repeat": 2, "of": [[{"attention": {"num_heads": 2}}, {"swiglu": {"hidden_dim": 24}}]]}],
    "train": {
        "steps": 10, "batch_size": 4, "seq_len": 24, "lr": 0.02, "warmup_steps": 2,
        "eval_every": 4, "eval_batches": 1, "checkpoint_every": 3,
    },
    "data": {"source": "", "heldout": 0.1, "heldout_bytes": 500},
}  # fmt: skip

_CHOICE = {"expert_choice": {"capacity": [1.0, 0.5], "warmup_steps": 6}}
_MOE = {"num_experts": 4, "hidden_dim": 16, "score": "sigmoid", "balance": "bias", "num_shared_experts": 1}
HYBRID = copy.deepcopy(DENSE) | {
    "name": "hybrid",
    "define": {
        "linear": [{"gated_deltanet": {"num_heads": 2}}, {"moe": _MOE}],
        "sparse": [{"moba": {"num_heads": 2, "block_size": 8, "top_k": 2}}, {"moe": {"hidden_dim": 8}}],
        "think": [{"attention": {"num_heads": 2}}, {"swiglu": {"hidden_dim": 16}}],
    },
    "trunk": ["linear", "sparse", {"loop": {"steps": 2, "router": _CHOICE, "of": ["think"]}},
              {"swiglu": {"hidden_dim": 16}, "share": "a"}, {"swiglu": {"hidden_dim": 16}, "share": "a"}],
}  # fmt: skip
HYBRID["train"] |= {"accumulation": 2}
HYBRID["data"] |= {"doc_ids": True}
CONFIGS = {"dense": DENSE, "hybrid": HYBRID}


def texts(folder: Path) -> Path:
    """A folder of small texts with something to learn."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(30):
        (folder / f"{i}.txt").write_text("".join(f"{(i * j) % 7} times {j} makes {i * j % 10}\n" for j in range(40)))
    return folder


def config(name: str, source: Path, **train) -> dict:
    """A copy of a configuration with its data in `source`."""
    made = copy.deepcopy(CONFIGS[name])
    made["data"]["source"] = str(source)
    made["train"] |= train
    return made


def history(folder: Path) -> list[dict]:
    """The metrics of a run without what depends on the machine."""
    records = read_metrics(Path(folder) / "metrics.jsonl")
    clock = ("tokens_per_second", "seconds", "mfu", "memory")
    return [{k: v for k, v in r.items() if k not in clock} for r in records]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The exported weights of a run."""
    return load_file(Path(folder) / "model" / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@contextmanager
def full_disk(room: int = 1000):
    """Files cannot grow beyond `room` bytes, as where a disk is full."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)


def damage(path, how):
    """Spoil a file: one bit of it flipped, its last byte gone, or all of it."""
    if how == "flipped":
        with path.open("r+b") as file:
            file.seek(os.path.getsize(path) // 2)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 1]))
    elif how == "truncated":
        os.truncate(path, os.path.getsize(path) - 1)
    else:
        path.unlink()


if __name__ == "__main__":
    from zoo.train import curve
    from zoo.train.run import train

    _, name, source, out, step = sys.argv
    add = curve.MetricsFile.add

    def add_and_die(self, record):
        add(self, record)
        if record["step"] == int(step):
            os.kill(os.getpid(), signal.SIGKILL)

    curve.MetricsFile.add = add_and_die
    train(config(name, Path(source)), out=out, progress=False)
