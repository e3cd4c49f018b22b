"""`zoo doctor`: what this machine has, which kernels are chosen, and why the others are refused."""

from __future__ import annotations

import importlib
import os
import platform
import sys
import warnings
from importlib import metadata
from typing import Any

from zoo.cli import output
from zoo.cli.options import Json

# name of the module, of the distribution, what it is for, the extra that brings it
LIBRARIES = (
    ("fla", "flash-linear-attention", "linear-attention kernels", "gpu"),
    ("mamba_ssm", "mamba-ssm", "Mamba kernels", "gpu"),
    ("xformers", "xformers", "attention kernels", "gpu"),
    ("torchtitan", "torchtitan", "zoo train", "train"),
    ("transformers", "transformers", "conversion from and to Hugging Face", "hf"),
)
_PROBED = ("fla", "mamba_ssm", "xformers")  # compiled against one torch: only an import tells whether they load


def command(as_json: Json = False) -> None:
    """Show versions, devices and, for each op, the chosen kernel and why each other one is refused."""
    with output.stdout_kept_for_json(as_json), output.working("looking"):
        found = diagnosis()
    output.emit(found) if as_json else _print(found)


def diagnosis() -> dict[str, Any]:
    """Everything that `zoo doctor` says."""
    import torch

    import zoo
    from zoo.kernels import dispatch

    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    return {
        "zoo": zoo.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "torch": {"version": torch.__version__, "threads": torch.get_num_threads(), "cuda": torch.version.cuda},
        "triton": _triton(),
        "libraries": [_library(*row) for row in LIBRARIES],
        "devices": [_device(name) for name in devices],
        "ops": {op: {name: _choice(op, name) for name in devices} for op in dispatch.ops()},
    }


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _library(module: str, distribution: str, purpose: str, extra: str) -> dict[str, Any]:
    version = _version(distribution)
    problem = None
    if version is None:
        problem = f"not installed: pip install 'block-zoo[{extra}]'"
    elif module in _PROBED:
        problem = _import_problem(module)
    return {"name": module, "for": purpose, "version": version, "problem": problem}


def _import_problem(module: str) -> str | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(module)
    except Exception as error:  # a broken library can raise anything
        return f"cannot be imported: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    return None


def _triton() -> dict[str, Any]:
    version = _version("triton")
    if version is None:
        problem = "not installed" + ("" if sys.platform == "linux" else f" (there is none for {sys.platform})")
        return {"version": None, "problem": problem}
    try:
        # to be importable is not to have a device to compile for
        importlib.import_module("triton").runtime.driver.active.get_current_target()
    except ImportError as error:
        return {"version": version, "problem": f"cannot be imported: {error}"}
    except RuntimeError:
        return {"version": version, "problem": "no GPU driver: its kernels cannot run here"}
    return {"version": version, "problem": None}


def _device(name: str) -> dict[str, Any]:
    import torch

    if name == "cpu":
        return {"name": name, "model": platform.processor() or platform.machine()}
    properties = torch.cuda.get_device_properties(name)
    capability = f"sm_{properties.major}{properties.minor}"
    return {"name": name, "model": properties.name, "capability": capability, "memory": properties.total_memory}


def _choice(op: str, device: str) -> dict[str, Any]:
    from zoo.kernels import dispatch

    rows = dispatch.explain(op, device)
    chosen = next((row.backend for row, word in rows if word == "chosen"), None)
    return {"chosen": chosen, "rows": [{"backend": row.backend, "status": word} for row, word in rows]}


def _print(found: dict[str, Any]) -> None:
    torch, triton = found["torch"], found["triton"]
    output.facts(
        {
            "zoo": found["zoo"],
            "python": found["python"],
            "platform": f"{found['platform']}, {found['processors']} processors",
            "torch": f"{torch['version']}, {torch['threads']} threads, "
            + (f"CUDA {torch['cuda']}" if torch["cuda"] else "built without CUDA"),
            "triton": " ".join(filter(None, (triton["version"], triton["problem"] and f"({triton['problem']})"))),
            **{d["name"]: " ".join(str(d[k]) for k in ("model", "capability") if k in d) for d in found["devices"]},
        }
    )
    print()
    rows = [(lib["name"], lib["version"] or "-", lib["problem"] or "ok", lib["for"]) for lib in found["libraries"]]
    output.table(("library", "version", "state", "for"), rows)
    print()
    rows = []
    for op, devices in found["ops"].items():
        for device, choice in devices.items():
            others = "; ".join(f"{r['backend']}: {r['status']}" for r in choice["rows"] if r["status"] != "chosen")
            rows.append((op, device, choice["chosen"] or "none", others))
    output.table(("op", "device", "chosen", "others"), rows)
