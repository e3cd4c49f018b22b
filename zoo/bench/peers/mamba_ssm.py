"""mamba-ssm's CUDA selective scan, which runs over the last dimension."""

# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from zoo.kernels.mamba_ssm import missing


def problem(device: str) -> str | None:
    """Why mamba-ssm cannot be raced on a device, or None."""
    return missing() or (None if device == "cuda" else "its CUDA kernels need a GPU")


def selective_scan_fn(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor
) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """u and delta as [B, E, T], B and C as [B, N, T]: so they lie in memory before the clock starts."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn as fn

    def run(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        u, delta, B, C = (x.transpose(1, 2) for x in (u, delta, B, C))
        return fn(u, delta, A, B, C).transpose(1, 2)

    u, delta, B, C = (x.to(u.dtype).transpose(1, 2).contiguous().transpose(1, 2) for x in (u, delta, B, C))
    return run, [u, delta, A.float(), B, C]
