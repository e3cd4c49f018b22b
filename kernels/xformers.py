"""xformers: memory-efficient attention, with block-diagonal masks for packed documents, as a row of attention."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from zoo.kernels import gpu
from zoo.kernels.libraries import packed, problem, untraceable

if TYPE_CHECKING:
    from zoo.kernels.attention.mask import Mask

missing = functools.partial(problem, "xformers", "xformers", "0.0.28")
CONSTRAINTS = {
    "priority": 15,
    "devices": ("cuda",),
    "dtypes": (torch.bfloat16, torch.float16),
    "missing": missing,
    "unfit": functools.partial(gpu.checked, "attention", "xformers"),
}


def refuse(q, k, v, mask: Mask, scale, softcap, sink_logits, need_lse) -> str | None:
    """Why memory_efficient_attention cannot do this call, or None."""
    if softcap is not None or sink_logits is not None or need_lse:
        return "has no soft cap, no sink logits and no log-sum-exp with its gradient"
    if not mask.plain:
        return "knows the order of memory only"
    if mask.sinks or (mask.window is not None and not mask.causal):
        return "has causal windows only, without sinks"
    if mask.q_doc_ids is not mask.k_doc_ids:
        return "packs documents of self-attention only"
    return untraceable()


def attention(q, k, v, mask: Mask, scale, softcap, sink_logits, need_lse) -> tuple[torch.Tensor, None]:
    """See `zoo.kernels.attention.attention`."""
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha import attn_bias

    shape = (*q.shape[:3], v.shape[-1])
    heads = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(heads, 2) for x in (k, v))
    if mask.q_doc_ids is None:
        if mask.window is not None:
            bias = attn_bias.LowerTriangularFromBottomRightLocalAttentionMask(mask.window)
        else:
            bias = attn_bias.LowerTriangularMask() if mask.causal else None
        return memory_efficient_attention(q, k, v, attn_bias=bias, scale=scale), None
    lengths = packed(mask.q_doc_ids).cu_seqlens.diff().tolist()
    kind = attn_bias.BlockDiagonalCausalMask if mask.causal else attn_bias.BlockDiagonalMask
    bias = kind.from_seqlens(lengths)
    if mask.window is not None:
        bias = bias.make_local_attention(mask.window)
    flat = (x.flatten(0, 1).unsqueeze(0) for x in (q, k, v))
    return memory_efficient_attention(*flat, attn_bias=bias, scale=scale).reshape(shape), None
