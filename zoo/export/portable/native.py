"""The C cores did not travel along."""

from __future__ import annotations

from torch import Tensor


def missing(op: str) -> str | None:
    """Why the core of an op cannot run."""
    return "is not part of this file"


def watched(*tensors: Tensor | None) -> str | None:
    """Why a core must not run on these."""
    return "is not part of this file"


def untraceable() -> str | None:
    """Why a core cannot run under a tracer."""
    return None
