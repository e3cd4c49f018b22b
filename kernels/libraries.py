"""Other people's kernels: whether their package can be used here, and the layout in which they take documents."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
import warnings
from importlib import metadata
from typing import NamedTuple

import torch
from torch import Tensor


@functools.cache
def problem(module: str, distribution: str, least: str) -> str | None:
    """Why a package cannot be used, or None. A package built for another torch can fail in any way when imported."""
    if importlib.util.find_spec(module) is None:
        return f"{distribution} is not installed: pip install {distribution}"
    try:
        have = metadata.version(distribution)
    except metadata.PackageNotFoundError:
        have = "0"
    if _numbers(have) < _numbers(least):
        return f"needs {distribution} {least} or newer, this is {have}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(module)
    except Exception as error:
        return f"{distribution} cannot be imported: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version)[:3])


def untraceable() -> str | None:
    """Kernels that are no registered operators break a traced graph."""
    return "cannot be traced by torch.compile" if torch.compiler.is_compiling() else None


class Packed(NamedTuple):
    """All documents of all rows as one row: document n is tokens cu_seqlens[n] .. cu_seqlens[n + 1]."""

    cu_seqlens: Tensor  # [N + 1]
    first: Tensor  # [B] the document that each row begins with
    last: Tensor  # [B] the document that each row ends with

    def initial(self, state: Tensor | None) -> Tensor | None:
        """States of the rows [B, ...] as states of the documents [N, ...]: zero where a row does not begin."""
        if state is None:
            return None
        return state.new_zeros(len(self.cu_seqlens) - 1, *state.shape[1:]).index_copy(0, self.first, state)


def packed(doc_ids: Tensor) -> Packed:
    """Documents of doc_ids [B, T]. Their number is data, so this waits for the GPU."""
    starts = torch.ones_like(doc_ids, dtype=torch.bool)
    starts[:, 1:] = doc_ids[:, 1:] != doc_ids[:, :-1]
    document = starts.flatten().cumsum(0).view_as(doc_ids) - 1
    end = torch.tensor([doc_ids.numel()], device=doc_ids.device)
    return Packed(torch.cat([starts.flatten().nonzero()[:, 0], end]), document[:, 0], document[:, -1])
