"""flash-linear-attention's chunk ops: [B, T, H, D], natural log-decays, equal heads of q and v, GPU only."""

# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from zoo.kernels.fla import missing

Call = tuple[Callable[..., Tensor], list[Tensor]]


def problem(device: str) -> str | None:
    """Why fla cannot be raced on a device, or None."""
    return missing() or (None if device == "cuda" else "its Triton kernels need a GPU")


def _heads(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """fla wants as many heads of q and k as of v; whoever shares them pays for the copies."""
    copies = v.shape[2] // q.shape[2]
    return [q, k, v] if copies == 1 else [q.repeat_interleave(copies, 2), k.repeat_interleave(copies, 2), v]


def chunk_gla(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Call:
    """A decay per channel."""
    from fla.ops.gla import chunk_gla as fn

    return lambda q, k, v, g: fn(*_heads(q, k, v), g, scale=1.0)[0], [q, k, v, g]


def chunk_simple_gla(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Call:
    """A decay per head, [H] constant or [B, T, H]."""
    from fla.ops.simple_gla import chunk_simple_gla as fn

    if g.ndim == 1:
        return lambda q, k, v, g: fn(*_heads(q, k, v), g_gamma=g, scale=1.0)[0], [q, k, v, g]
    return lambda q, k, v, g: fn(*_heads(q, k, v), g=g, scale=1.0)[0], [q, k, v, g]


def chunk_gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor) -> Call:
    """The delta rule with a decay per head; its scale is D^-0.5."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule as fn

    return lambda q, k, v, beta, g: fn(q, k, v, g=g, beta=beta)[0], [q, k, v, beta, g]


def chunk_kda(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor) -> Call:
    """The delta rule with a decay per channel; its scale is D^-0.5."""
    from fla.ops.kda import chunk_kda as fn

    return lambda q, k, v, beta, g: fn(q, k, v, g=g, beta=beta)[0], [q, k, v, beta, g]
