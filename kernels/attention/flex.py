"""Attention by torch's FlexAttention: any mask, soft caps and the log-sum-exp, skipping blocks that nobody sees."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from zoo.kernels.attention.mask import Mask

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def _compiled():
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

    return torch.compile(flex_attention, dynamic=False), create_block_mask, AuxRequest(lse=True)


def refuse(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, softcap: float | None,
    sink_logits: Tensor | None, need_lse: bool,
) -> str | None:  # fmt: skip
    """Why FlexAttention cannot do this call, or None."""
    if q.device.type == "cpu" and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        return "has no backward on a CPU"
    if torch.compiler.is_compiling():
        return "is a compiled function of its own"
    return "has no sink logits" if sink_logits is not None else None


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, softcap: float | None,
    sink_logits: Tensor | None, need_lse: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """See `zoo.kernels.attention.attention`."""
    run, create_block_mask, with_lse = _compiled()
    (B, T), S = q.shape[:2], k.shape[1]

    def visible(b, h, i, j):
        row, column = (
            (i, j) if mask.q_index is None or mask.k_index is None else (mask.q_index[b, i], mask.k_index[b, j])
        )
        seen = column >= 0
        if mask.causal:
            seen = seen & (column <= row)
        if mask.window is not None:
            seen = seen & (((row - column).abs() < mask.window) | (column < mask.sinks))
        if mask.q_doc_ids is not None and mask.k_doc_ids is not None:
            seen = seen & (mask.q_doc_ids[b, i] == mask.k_doc_ids[b, j])
        return seen

    def capped(score, b, h, i, j):
        return softcap * torch.tanh(score / softcap)

    blocks = create_block_mask(visible, B, None, T, S, device=q.device)
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    o, extra = run(
        q, k, v, score_mod=None if softcap is None else capped, block_mask=blocks, scale=scale,
        enable_gqa=q.shape[1] != k.shape[1], return_aux=with_lse,
    )  # fmt: skip
    lse = extra.lse
    empty = lse == -torch.inf
    o = o.masked_fill(empty[..., None], 0)
    return o.transpose(1, 2), lse.transpose(1, 2).float() if need_lse else None
