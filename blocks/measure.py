"""What sparse blocks measure of themselves while they train; `metrics` hold detached tensors."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from zoo.row import mean
from zoo.segments import rehearsing


def recording(module: nn.Module) -> bool:
    """Whether a forward should write metrics and counters: in training, not while exporting, not where it is made
    again later, and not in the second forward of activation checkpointing (which runs inside a backward)."""
    if not module.training or torch.compiler.is_exporting() or rehearsing():
        return False
    return torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1


def group_counts(indices: Tensor, groups: int) -> Tensor:
    """How often each of 0 .. groups-1 stands in `indices`, int64 [groups]; the shape is static, unlike bincount's."""
    flat = indices.flatten()
    return flat.new_zeros(groups).scatter_add_(0, flat, torch.ones_like(flat))


def load_metrics(counts: Tensor) -> dict[str, Tensor]:
    """`load_entropy` (1 where all experts get the same, 0 where one gets all), `max_load` (busiest over mean) and
    `idle_experts`, the share of those that get less than a hundredth of the mean."""
    share = counts.detach() / counts.sum().clamp(min=1)
    entropy = -(share * share.clamp(min=1e-12).log()).sum()
    load = share * len(counts)  # 1: the mean
    return {
        "load_entropy": entropy / math.log(max(len(counts), 2)),
        "max_load": load.max(),
        "idle_experts": (load < 0.01).to(load.dtype).mean(),
    }


def balance_loss(probabilities: Tensor, counts: Tensor) -> Tensor:
    """E sum_i f_i P_i: f the share of assignments an expert got, P its mean probability; 1 where uniform.

    probabilities: [..., N, E], rows summing to 1; counts: [..., E] over the same tokens; mean over what leads.
    Of a slice of a row: f counts all slices, P its own, so that the mean over slices is the loss of the row.
    """
    share = mean(counts / counts.sum(-1, keepdim=True).clamp(min=1))
    return counts.shape[-1] * (share.to(probabilities.dtype) * probabilities.mean(-2)).sum(-1).mean()


def chunk_level_sparsity(active: Tensor, span: int, doc_ids: Tensor | None = None) -> Tensor:
    """CLS_n: mean share of experts that no token of a window of n consecutive tokens uses.

    active: [B, T, E] bool; windows stay inside a document. n = 1 gives the token-level sparsity TLS.
    """
    B, T, E = active.shape
    span = min(span, T)
    total = torch.cat([active.new_zeros(B, 1, E, dtype=torch.long), active.long().cumsum(1)], dim=1)
    unused = (total[:, span:] == total[:, : T + 1 - span]).float().mean(-1)  # [B, T - span + 1]
    if doc_ids is None:
        return unused.mean()
    inside = (doc_ids[:, span - 1 :] == doc_ids[:, : T + 1 - span]).float()
    return (unused * inside).sum() / inside.sum().clamp(min=1)
