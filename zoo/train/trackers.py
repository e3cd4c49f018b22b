"""TensorBoard and Weights & Biases beside metrics.jsonl, for those who keep their runs there."""

from __future__ import annotations

import importlib.util
import netrc
import os
import secrets
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlparse

from zoo.errors import ConfigError, Problem, ZooError
from zoo.sections import TrainSection
from zoo.train.files import write_text

_SERVER = "https://api.wandb.ai"
_REACHED_IN = 3.0  # seconds


class Tracker(Protocol):
    """Somewhere that scalars of a step are told to."""

    def add(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def check_trackers(train: TrainSection, folder: Path | None) -> None:
    """Before any time is spent: what `train:` asks for is installed, and there is a folder for it."""
    for option, wanted in (("tensorboard", train.tensorboard), ("wandb", bool(train.wandb))):
        if not wanted:
            continue
        if folder is None:
            raise ConfigError([Problem("needs a run folder: give out", f"train.{option}")])
        spec = importlib.util.find_spec(option)
        if spec is None or spec.origin is None:  # without an origin it is a folder of that name lying about
            raise ZooError(f"train.{option} needs the package {option}: pip install 'block-zoo[watch]'")


@contextmanager
def trackers(
    train: TrainSection, folder: Path, name: str, document: dict[str, Any], after: int
) -> Iterator[list[Tracker]]:
    """Those that `train:` asks for. after: the step that a resumed run goes on from."""
    found: list[Tracker] = []
    try:
        if train.tensorboard:
            found.append(_TensorBoard(folder, after))
        if train.wandb:
            found.append(_Wandb(train.wandb, folder, name, document))
        yield found
    finally:
        for tracker in found:
            tracker.close()


def scalars(record: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a line of metrics.jsonl or health.jsonl, `/` between the names of nested ones."""
    flat: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            flat |= scalars(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and key != "step":
            flat[f"{prefix}{key}"] = value
    return flat


class _TensorBoard:
    def __init__(self, folder: Path, after: int):
        from torch.utils.tensorboard import SummaryWriter

        # what the run did after the step it goes on from is shown no more
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=after + 1 if after else None)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class _Wandb:
    def __init__(self, project: str, folder: Path, name: str, document: dict[str, Any]):
        import wandb

        known = folder / "wandb.id"  # a resumed run is the same run there too
        if not known.is_file():
            write_text(known, secrets.token_hex(4))
        self.run: Any = wandb.init(
            project=project,
            name=f"{name} {folder.name}",
            dir=str(folder),
            id=known.read_text(encoding="utf-8").strip(),
            resume="allow",
            config=document,
            mode=_mode(),
            settings=wandb.Settings(silent=True, console="off"),
        )

    def add(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()


def _mode() -> Any:
    """WANDB_MODE if it is set; else online for who is logged in and reaches the server, and offline for others."""
    if "WANDB_MODE" in os.environ:
        return None  # wandb reads it
    host = urlparse(os.environ.get("WANDB_BASE_URL", _SERVER)).hostname or ""
    return "online" if _logged_in(host) and _reached(host) else "offline"


def _logged_in(host: str) -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _reached(host: str) -> bool:
    try:
        socket.create_connection((host, 443), timeout=_REACHED_IN).close()
    except OSError:
        return False
    return True
