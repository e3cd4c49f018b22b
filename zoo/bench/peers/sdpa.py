"""torch's scaled_dot_product_attention as it is called by people who have no other kernel."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def problem(device: str) -> None:
    """Always there."""


def causal(q: Tensor, k: Tensor, v: Tensor) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """Causal attention on [B, T, H, D]."""
    grouped = q.shape[2] != k.shape[2]

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(1, 2)

    return run, [q, k, v]


def step(q: Tensor, k: Tensor, v: Tensor) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """One query that sees every key."""
    grouped = q.shape[2] != k.shape[2]

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return scaled_dot_product_attention(q, k, v, enable_gqa=grouped).transpose(1, 2)

    return run, [q, k, v]
