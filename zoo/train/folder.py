"""The folder of a run: what is written into it, and what may go on in it."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from omegaconf import OmegaConf
from torch import nn

import zoo
from zoo.errors import ConfigError, DataError, Problem
from zoo.sections import DataSection, TrainSection
from zoo.train.curve import draw
from zoo.train.files import new_folder, write_text
from zoo.train.prepare import Data
from zoo.train.speed import Speed
from zoo.train.tokenizer import FileTokenizer, Tokenizer, load_tokenizer

# options of `train:` that a resumed run may change; everything else must be as it was
MAY_CHANGE = (
    "steps", "lr", "muon_lr", "min_lr_factor", "schedule", "warmup_steps", "decay_fraction", "wsd_decay", "grad_clip",
    "accumulation", "dtype", "compile", "activation_checkpoint", "activation_budget", "loss_chunks", "sequence_chunks",
    "eval_every", "eval_batches", "checkpoint_every", "keep_checkpoints", "checkpoint_async", "health_every",
    "tensorboard", "wandb", "on_nan", "spike_factor", "on_spike", "max_skips",
)  # fmt: skip


def free_folder(name: str, under: Path = Path("runs")) -> Path:
    """The first of runs/name, runs/name-2, ... that does not exist."""
    number = 1
    while (path := under / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return path


def read_document(config: Any) -> dict[str, Any]:
    """A configuration, checked and resolved, as plain values."""
    return cast(dict[str, Any], OmegaConf.to_container(zoo.load_config(config), resolve=True))


def check_folder(folder: Path, resume: bool, document: dict[str, Any]) -> None:
    """Refuse to write over a run, or to go on with something else than what was begun."""
    known = folder / "config.yaml"
    if not resume:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            what = "holds a run: go on with it by resume, or" if known.is_file() else "is not an empty folder:"
            raise ConfigError(f"{folder} {what} give another out")
        return
    if not known.is_file():
        raise ConfigError(f"{folder} holds no run to resume (it has no config.yaml)")
    before = read_document(known)
    changed = [Problem(f"was {a!r} when the run began, is {b!r}", key) for key, a, b in _differences(before, document)]
    if changed:
        raise ConfigError([Problem(f"{folder} cannot be resumed with another configuration"), *changed])


def _differences(before: dict[str, Any], now: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    sections = {"train": TrainSection, "data": DataSection}
    for key in dict.fromkeys([*before, *now]):
        if key in sections:
            a, b = (sections[key].from_mapping(d.get(key)) for d in (before, now))
            for option in vars(a):
                if key == "train" and option in MAY_CHANGE:
                    continue
                if getattr(a, option) != getattr(b, option):
                    yield f"{key}.{option}", getattr(a, option), getattr(b, option)
        elif key != "parallel" and before.get(key) != now.get(key):
            yield key, _short(before.get(key)), _short(now.get(key))


def _short(value: Any) -> Any:
    return value if len(repr(value)) < 80 else f"{repr(value)[:77]}..."


def describe(
    folder: Path, document: dict[str, Any], data: dict[str, Any], resume: bool, speed: Speed | None = None
) -> None:
    """Write config.yaml and environment.json. DataError where a resumed run would see other data."""
    path = folder / "environment.json"
    if resume and path.is_file():
        before = json.loads(path.read_text(encoding="utf-8")).get("data")
        if before != data:
            raise DataError(
                f"{folder} cannot be resumed: the data are not those of its first start ({before} -> {data})"
            )
    write_text(folder / "config.yaml", yaml.safe_dump(document, sort_keys=False, allow_unicode=True))
    write_text(path, json.dumps(_environment() | {"data": data, "speed": speed and speed.as_dict()}, indent=2) + "\n")


def _environment() -> dict[str, Any]:
    def version(package: str) -> str | None:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    return {
        "zoo": zoo.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchtitan": version("torchtitan"),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "command": sys.argv,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _commit() -> str | None:
    try:
        # the last commit of this very folder: none where the package lies in somebody else's repository
        command = ["git", "-C", str(Path(__file__).resolve().parent), "log", "-1", "--format=%H", "--", "."]
        done = subprocess.run(command, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def finish(
    folder: Path,
    data: Data,
    records: list[dict[str, Any]],
    evaluation: dict[str, Any] | None,
    sample: str | None,
    model: nn.Module | None,
) -> None:
    """Write what is there at the end of a run, or of a part of it."""
    if evaluation is not None and sample is not None and model is not None:
        with new_folder(folder / "model") as temporary:
            model.save_pretrained(temporary)  # type: ignore[operator]
            if isinstance(data.tokenizer, FileTokenizer):
                shutil.copyfile(data.tokenizer.path, temporary / "tokenizer.json")
        write_text(folder / "evaluation.json", json.dumps(evaluation, indent=2) + "\n")
        write_text(folder / "sample.txt", sample)
    if records:
        names = ("unigram", "bigram", "gzip")
        figures = {n: evaluation[f"{n}_bits_per_byte"] for n in names} if evaluation and data.bits else {}
        draw(records, folder / "loss.png", figures, data.bits, data.loss)


def tokenizer_of(folder: str | Path) -> Tokenizer:
    """The tokenizer of a run or of its `model/` folder."""
    folder = Path(folder)
    for path in (folder / "tokenizer.json", folder / "model" / "tokenizer.json"):
        if path.is_file():
            return FileTokenizer(path)
    return load_tokenizer(DataSection.from_mapping(read_document(folder / "config.yaml").get("data")).tokenizer)
