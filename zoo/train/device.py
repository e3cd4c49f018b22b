"""What surrounds torchtitan: the CPU in the place of an accelerator, one process group, silence."""

from __future__ import annotations

import logging
import os
import resource
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist


class Cpu:
    """torch.cpu, and the calls that torchtitan makes of an accelerator's module."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

    def current_device(self) -> int:
        return 0

    def get_device_name(self, device: Any = None) -> str:
        return "CPU"

    def get_device_properties(self, device: Any = None) -> SimpleNamespace:
        return SimpleNamespace(name="CPU", total_memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))

    def memory_stats(self, device: Any = None) -> dict[str, int]:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return {"active_bytes.all.peak": peak, "reserved_bytes.all.peak": peak, "num_alloc_retries": 0, "num_ooms": 0}

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        pass

    def empty_cache(self) -> None:
        pass


def world_size() -> int:
    """Processes of this run, as torchrun says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process writes the run folder and tells of the run."""
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def process_group() -> Iterator[None]:
    """The process group that torchtitan needs; the one that is there, if one is."""
    mine, hook = not dist.is_initialized(), sys.excepthook
    had = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = had or "0"
    try:
        if mine and world_size() > 1:
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        elif mine:  # a store in memory needs no network
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # pyright: ignore
        yield
    finally:
        if mine and dist.is_initialized():
            dist.destroy_process_group()
            sys.excepthook = hook  # torch put the rank in front of every line of it
        if had is None:
            del os.environ["LOCAL_RANK"]


@contextmanager
def quiet() -> Iterator[None]:
    """torchtitan's log and the warnings of torch's trainers' parts stay unsaid."""

    # torchtitan logs to the root logger: leave other people's records alone
    def keep(record: logging.LogRecord) -> bool:
        return f"{os.sep}torchtitan{os.sep}" not in record.pathname or record.levelno >= logging.ERROR

    root, own = logging.getLogger(), logging.getLogger("torchtitan")
    level = own.level
    root.addFilter(keep)
    own.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"torch\.(distributed|optim)\.|torchtitan\.|torchdata\.")
            yield
    finally:
        root.removeFilter(keep)
        own.setLevel(level)
