"""Definition of attention: an explicit softmax per token and head."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.attention.mask import Mask, Tile


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, softcap: float | None,
    sink_logits: Tensor | None, need_lse: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """p_j = exp(s_j) / (sum_j exp(s_j) + exp(sink)), o = sum_j p_j v_j, lse = log of the denominator."""
    B, _, Hq, _ = q.shape
    S, group = k.shape[1], Hq // k.shape[2]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    k, v = (x.to(wide).repeat_interleave(group, 2) for x in (k, v))
    outputs, denominators = [], []
    for t, q_t in enumerate(q.to(wide).unbind(1)):
        s = torch.einsum("bhd,bshd->bhs", q_t, k) * scale
        if softcap is not None:
            s = softcap * torch.tanh(s / softcap)
        seen = mask.visible(Tile(t, t + 1, 0, 0, S), q.device)
        if seen is not None:
            s = s.masked_fill(~seen, -torch.inf)
        if sink_logits is not None:
            s = torch.cat([s, sink_logits.to(wide)[:, None].expand(B, Hq, 1)], -1)
        lse = torch.logsumexp(s, -1)
        empty = lse == -torch.inf
        p = torch.exp(s - lse.masked_fill(empty, 0)[..., None])
        outputs.append(torch.einsum("bhs,bshd->bhd", p[..., :S], v))
        denominators.append(lse)
    return torch.stack(outputs, 1).to(q.dtype), torch.stack(denominators, 1) if need_lse else None
