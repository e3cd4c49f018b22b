"""Weights of another run or model as a beginning: those whose name and shape fit, with a plan that says which."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from zoo.errors import ConfigError, Problem

WEIGHTS = "model.safetensors"
How = Literal["kept", "new", "shape differs", "dropped"]


@dataclass(frozen=True)
class Line:
    """One tensor: its shapes here and there (None where there is none), and what becomes of it."""

    name: str
    how: How
    here: tuple[int, ...] | None
    there: tuple[int, ...] | None


@dataclass(frozen=True)
class Initial:
    """What `train.init_from` gives to a model."""

    path: Path
    lines: tuple[Line, ...]

    def give(self, model: nn.Module) -> None:
        """Overwrite the weights of a model that was just drawn, or of the part of it that this process holds."""
        kept = {line.name for line in self.lines if line.how == "kept"}
        with safe_open(self.path, framework="pt") as file, torch.no_grad():
            for name, tensor in model.state_dict(keep_vars=True).items():
                if name in kept:
                    _copy(tensor, file.get_tensor(name))

    def as_dict(self) -> dict[str, Any]:
        """For init.json."""
        by = {
            how: {n.name: n.here or n.there for n in self.lines if n.how == how} for how in ("kept", "new", "dropped")
        }
        differs = {n.name: {"here": n.here, "there": n.there} for n in self.lines if n.how == "shape differs"}
        return {"from": str(self.path), **by, "shape differs": differs}

    def __str__(self) -> str:
        """A table: layers that are alike stand in one row, `*` in the place of their numbers."""
        rows: dict[tuple, int] = {}
        for line in self.lines:
            key = (re.sub(r"\d+", "*", line.name), line.how, line.here, line.there)
            rows[key] = rows.get(key, 0) + 1
        cells = [("weights", "how many", "here", "there", "")]
        cells += [(name, str(n), _shape(here), _shape(there), how) for (name, how, here, there), n in rows.items()]
        widths = [max(len(row[i]) for row in cells) for i in range(4)]
        text = ["  ".join([*(c.ljust(w) for c, w in zip(row, widths)), row[4]]).rstrip() for row in cells]
        kept = sum(line.how == "kept" for line in self.lines)
        here = sum(line.here is not None for line in self.lines)
        return "\n".join([f"{kept} of {here} tensors begin as in {self.path}", *text])


def _shape(shape: tuple[int, ...] | None) -> str:
    return "-" if shape is None else "x".join(map(str, shape)) or "scalar"


def _copy(mine: Tensor, given: Tensor) -> None:
    from torch.distributed.tensor import DTensor

    from zoo.parallel.weights import put

    if isinstance(mine, DTensor):  # each rank keeps its share of what all have read
        put(mine, given.to(mine.device, mine.dtype))
    else:
        mine.copy_(given)


def initial(source: str, model: nn.Module) -> Initial:
    """Compare a saved model with `model` (which may be on meta). ConfigError where nothing can be taken over."""
    folder = Path(source)
    path = next((p for p in (folder / WEIGHTS, folder / "model" / WEIGHTS) if p.is_file()), None)
    if path is None:
        raise _wrong(f"{source} has no {WEIGHTS}; is it a saved model or the folder of a finished run?")
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            there = {name: tuple(file.get_slice(name).get_shape()) for name in names}
    except (SafetensorError, OSError) as error:
        raise _wrong(f"{path} is damaged or no safetensors file: {error}") from None
    seen: dict[int, str] = {}
    tensors = model.state_dict(keep_vars=True)
    here = {n: tuple(t.shape) for n, t in tensors.items() if seen.setdefault(id(t), n) == n}  # a tied one once
    lines = _compare(here, there)
    if not any(line.how == "kept" for line in lines):
        raise _wrong(f"no weight of {path} fits this model in name and shape")
    return Initial(path, tuple(lines))


def _compare(here: Mapping[str, tuple[int, ...]], there: Mapping[str, tuple[int, ...]]) -> list[Line]:
    found = []
    for name, shape in here.items():
        other = there.get(name)
        how: How = "new" if other is None else "kept" if other == shape else "shape differs"
        found.append(Line(name, how, shape, other))
    return found + [Line(name, "dropped", None, shape) for name, shape in there.items() if name not in here]


def _wrong(why: str) -> ConfigError:
    return ConfigError([Problem(why, "train.init_from")])
