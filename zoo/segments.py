"""Rows that are trained segment by segment: what states carry from one segment to the next, and with which gradient.

Blocks write `handed_on(x)` into their states, in place. As a rule that has no gradient: segments are trained one after
the other (truncated backpropagation). Inside `differentiable_states` it keeps its graph, so that the gradient of a
later segment reaches an earlier one. A segment must then be given a copy of the state (`clone`): what it writes into,
no earlier graph may hold, and autograd lets nobody write into a leaf.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor

_differentiable = False
_rehearsing = False


@contextlib.contextmanager
def differentiable_states() -> Iterator[None]:
    """Within, gradients pass through states from segment to segment."""
    global _differentiable
    before, _differentiable = _differentiable, True
    try:
        yield
    finally:
        _differentiable = before


def differentiable() -> bool:
    """Whether what is written into states keeps its graph."""
    return _differentiable


def handed_on(x: Tensor) -> Tensor:
    """What a block writes into its state, in place: x without its gradient, or with it in `differentiable_states`."""
    return x if _differentiable else x.detach()


@contextlib.contextmanager
def rehearsal() -> Iterator[None]:
    """Within, a forward pass of training is one that will be made again: nothing is counted."""
    global _rehearsing
    before, _rehearsing = _rehearsing, True
    try:
        yield
    finally:
        _rehearsing = before


def rehearsing() -> bool:
    """Whether the forward pass under way is made again later."""
    return _rehearsing
