"""flash-linear-attention: its chunk kernels as rows of linear_attention and delta_rule.

They take [B, T, H, D], natural log-decays and K-first fp32 states, as our ops do, but as many heads of q and k as of
v, and documents as one flat row with cu_seqlens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from zoo.kernels import gpu
from zoo.kernels.libraries import packed, problem, untraceable

MAX_HEAD_DIM = 256
missing = functools.partial(problem, "fla", "flash-linear-attention", "0.5")


def constraints(op: str) -> dict:
    """What the `fla` row of an op needs."""
    return {
        "priority": 20,
        "devices": ("cuda",),
        "min_capability": (8, 0),
        "dtypes": (torch.float32, torch.bfloat16, torch.float16),
        "missing": missing,
        "unfit": functools.partial(gpu.checked, op, "fla"),
    }


def _too_wide(k: Tensor) -> str | None:
    width = k.shape[-1]
    return f"head_dim {width} is above {MAX_HEAD_DIM}" if width > MAX_HEAD_DIM else None


def _run(fn: Callable, tensors: tuple[Tensor, ...], options: dict, initial_state, doc_ids) -> tuple[Tensor, Tensor]:
    """Call a chunk op on [B, T, ...] tensors, as one flat row where there are documents."""
    v = tensors[2]
    state = None if initial_state is None else initial_state.float()
    if doc_ids is None:
        return fn(*tensors, initial_state=state, output_final_state=True, **options)
    docs = packed(doc_ids)
    flat = [x.flatten(0, 1).unsqueeze(0) for x in tensors]
    o, last = fn(
        *flat, initial_state=docs.initial(state), output_final_state=True, cu_seqlens=docs.cu_seqlens, **options
    )
    return o.reshape(v.shape), last[docs.last]


def _all_heads(v: Tensor, *shared: Tensor) -> list[Tensor]:
    """q and k repeated for every head of v, in its dtype."""
    return [x.to(v.dtype).repeat_interleave(v.shape[2] // x.shape[2], 2) for x in shared]


def linear_attention_refuses(q, k, v, log_decay, scale, initial_state, doc_ids, chunk_size) -> str | None:
    """Why fla cannot do this call of linear_attention, or None."""
    return untraceable() or _too_wide(k)


def linear_attention(q, k, v, log_decay, scale, initial_state, doc_ids, chunk_size) -> tuple[Tensor, Tensor]:
    """chunk_gla for a decay per channel, chunk_simple_gla for one per head or none."""
    q, k = _all_heads(v, q, k)
    if log_decay is not None and log_decay.ndim == 4:
        from fla.ops.gla import chunk_gla

        return _run(chunk_gla, (q, k, v, log_decay.float()), {"scale": scale}, initial_state, doc_ids)
    from fla.ops.simple_gla import chunk_simple_gla

    if log_decay is None:
        log_decay = torch.zeros(v.shape[2], device=v.device)
    g = log_decay.float().expand(v.shape[:3])
    return _run(chunk_simple_gla, (q, k, v, g), {"scale": scale}, initial_state, doc_ids)


def delta_rule_refuses(q, k, v, beta, log_decay, scale, initial_state, doc_ids, chunk_size) -> str | None:
    """Why fla cannot do this call of delta_rule, or None."""
    return untraceable() or _too_wide(k)


def delta_rule(q, k, v, beta, log_decay, scale, initial_state, doc_ids, chunk_size) -> tuple[Tensor, Tensor]:
    """chunk_kda for a decay per channel, chunk_gated_delta_rule for one per head or none."""
    q, k = _all_heads(v, q, k)
    if log_decay is not None and log_decay.ndim == 4:
        from fla.ops.kda import chunk_kda as fn
    else:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule as fn
    g = torch.zeros_like(beta, dtype=torch.float32) if log_decay is None else log_decay.float()
    return _run(fn, (q, k, v, g, beta.float()), {"scale": scale}, initial_state, doc_ids)
