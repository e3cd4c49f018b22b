"""Grouped matrix product: row n is multiplied by the weight of its group (expert)."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels import gpu
from zoo.kernels.dispatch import call, register_row
from zoo.kernels.grouped_mm import chunked, external, reference

# On a CPU a loop of plain products is as fast as torch's own op and takes every dtype and shape; on a GPU it
# would wait for the counts, so it is not offered there.
register_row("grouped_mm", "loop", external.loop, priority=30, devices=("cpu", "meta"))
gpu.register_triton_row(
    "grouped_mm", "zoo.kernels.grouped_mm.external:triton", priority=25, refuse=external.triton_refuses
)
register_row(
    "grouped_mm",
    "torch",
    external.torch_grouped_mm,
    priority=20,
    dtypes=external.TORCH_DTYPES,
    refuse=external.torch_refuses,
)
register_row("grouped_mm", "chunked", chunked.grouped_mm, priority=10)
register_row("grouped_mm", "reference", reference.grouped_mm, priority=0)


def grouped_mm(x: Tensor, weight: Tensor, counts: Tensor, *, backend: str = "auto") -> Tensor:
    """y_n = x_n W_e with e the group of row n; the rows of x are sorted by group.

    x: [N, K]; weight: [E, K, M]; counts: [E] int64, the number of rows of each group, summing to N, zeros
    allowed. Returns y [N, M] in x's dtype (under autocast in its dtype, as matmul does). No shape depends on the
    counts, so it compiles and exports.
    """
    if x.ndim != 2 or weight.ndim != 3 or counts.ndim != 1:
        raise ValueError(f"grouped_mm takes x [N, K], weight [E, K, M], counts [E], got {x.ndim}, {weight.ndim}, "
                         f"{counts.ndim} dimensions")  # fmt: skip
    if x.shape[1] != weight.shape[1] or weight.shape[0] != counts.shape[0]:
        raise ValueError(
            f"grouped_mm: x {tuple(x.shape)}, weight {tuple(weight.shape)} and counts {tuple(counts.shape)} do not "
            "agree; they must be [N, K], [E, K, M], [E]"
        )
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        half = torch.get_autocast_dtype(device)
        x, weight = x.to(half), weight.to(half)
    return call("grouped_mm", backend, x, weight, counts)
