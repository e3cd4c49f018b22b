"""flash-attention: dense, windowed and packed attention as a row of attention."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from zoo.kernels import gpu
from zoo.kernels.libraries import packed, problem, untraceable

if TYPE_CHECKING:
    from zoo.kernels.attention.mask import Mask

missing = functools.partial(problem, "flash_attn", "flash-attn", "2.6")
CONSTRAINTS = {
    "priority": 25,
    "devices": ("cuda",),
    "dtypes": (torch.bfloat16, torch.float16),
    "min_capability": (8, 0),
    "missing": missing,
    "unfit": functools.partial(gpu.checked, "attention", "flash_attn"),
}


def refuse(q, k, v, mask: Mask, scale, softcap, sink_logits, need_lse) -> str | None:
    """Why flash-attention cannot do this call, or None."""
    if sink_logits is not None or need_lse:
        return "has no sink logits and no log-sum-exp with its gradient"
    if not mask.plain or mask.sinks:
        return "knows the order of memory only, and no sinks"
    if mask.q_doc_ids is not mask.k_doc_ids:
        return "packs documents of self-attention only"
    if q.shape[-1] != v.shape[-1] or q.shape[-1] > 256:
        return "needs one head_dim for keys and values, at most 256"
    return untraceable()


def attention(q, k, v, mask: Mask, scale, softcap, sink_logits, need_lse) -> tuple[torch.Tensor, None]:
    """See `zoo.kernels.attention.attention`."""
    import flash_attn

    reach = -1 if mask.window is None else mask.window - 1  # keys behind the query, itself not counted
    options = {
        "softmax_scale": scale,
        "causal": mask.causal,
        "window_size": (reach, 0 if mask.causal else reach) if mask.window is not None else (-1, -1),
        "softcap": softcap or 0.0,
    }
    if mask.q_doc_ids is None:
        return flash_attn.flash_attn_func(q, k, v, **options), None
    ends = packed(mask.q_doc_ids).cu_seqlens.int()
    longest = int(ends.diff().max())
    o = flash_attn.flash_attn_varlen_func(
        *(x.flatten(0, 1) for x in (q, k, v)), ends, ends, longest, longest, **options
    )
    return o.reshape(q.shape), None
