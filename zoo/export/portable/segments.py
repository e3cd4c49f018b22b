"""What a block writes into its state. Gradients end there: rows are streamed for inference."""

from __future__ import annotations

from torch import Tensor


def handed_on(x: Tensor) -> Tensor:
    """What a block writes into its state, in place: x without its gradient."""
    return x.detach()


def differentiable() -> bool:
    """Whether what is written into states keeps its graph."""
    return False


def rehearsing() -> bool:
    """Whether the forward pass under way is made again later."""
    return False
