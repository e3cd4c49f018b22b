"""Definition of attention over a BlockList: a masked softmax, one query at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.block_list import BlockList


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: BlockList,
    causal: bool,
    window: int | None,
    scale: float,
    q_index: Tensor,
    k_index: Tensor,
    q_doc_ids: Tensor | None,
    k_doc_ids: Tensor | None,
    k_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `zoo.kernels.sparse_attention.sparse_attention`."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    Hq, group = q.shape[2], q.shape[2] // k.shape[2]
    keys, values = (x.to(dtype).repeat_interleave(group, 2) for x in (k, v))
    listed = blocks.mask(k.shape[1])  # [B, Hs, Nq, Tk]
    listed = listed.repeat_interleave(Hq // listed.shape[1], 1)
    outputs, lses = [], []
    for t, query in enumerate(q.to(dtype).unbind(1)):
        visible = (k_index >= 0)[:, None] & listed[:, :, t // blocks.q_tile]  # [B, Hq, Tk]
        now = q_index[:, t, None]
        if causal:
            visible = visible & (k_index <= now)[:, None]
        if window is not None:
            visible = visible & (now - k_index < window)[:, None]
        if q_doc_ids is not None:
            visible = visible & (k_doc_ids == q_doc_ids[:, t, None])[:, None]
        logits = scale * (query[:, None] * keys).sum(-1).transpose(1, 2)
        if k_bias is not None:
            logits = logits + k_bias.to(dtype).transpose(1, 2).repeat_interleave(Hq // k_bias.shape[2], 1)
        logits = torch.where(visible, logits, float("-inf"))
        some = visible.any(-1)
        lse = torch.where(some[..., None], logits, 0).logsumexp(-1)
        p = torch.where(visible, logits - lse[..., None], float("-inf")).exp()
        outputs.append((p.transpose(1, 2)[..., None] * values).sum(1))
        lses.append(torch.where(some, lse, float("-inf")))
    return torch.stack(outputs, 1).to(q.dtype), torch.stack(lses, 1)
