"""Masked softmax in vectorised torch, a tile of queries at a time.

Under autograd each tile is recomputed in backward, so that memory stays linear in the length.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from zoo.kernels.attention.mask import Mask, tiles


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, softcap: float | None,
    sink_logits: Tensor | None, need_lse: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """See `zoo.kernels.attention.attention`."""
    cuts = list(tiles(q.shape[1], k.shape[1], mask.causal, mask.window, mask.sinks, mask.plain, fused=False))
    recompute = len(cuts) > 1 and torch.is_grad_enabled()
    outputs, denominators = [], []
    for tile in cuts:
        seen = mask.visible(tile, q.device)
        arguments = (tile.queries(q), tile.keys(k), tile.keys(v), seen, scale, softcap, sink_logits)
        o, lse = checkpoint(_tile, *arguments, use_reentrant=False) if recompute else _tile(*arguments)
        outputs.append(o)
        denominators.append(lse)
    return torch.cat(outputs, 1), torch.cat(denominators, 1) if need_lse else None


def _tile(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scale: float, softcap: float | None,
    sink_logits: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    B, T, Hq, D = q.shape
    S, Hkv = k.shape[1:3]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    # the heads of a group are rows of one product: [B, Hkv, G * T, .]
    rows = q.to(wide).unflatten(2, (Hkv, Hq // Hkv)).permute(0, 2, 3, 1, 4).reshape(B, Hkv, -1, D) * scale
    s = rows @ k.to(wide).permute(0, 2, 3, 1)
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    s = s.view(B, Hq, T, S)
    if seen is not None:
        s = s.masked_fill(~seen[:, None], -torch.inf)
    top = s.detach().amax(-1, keepdim=True)
    sink = None
    if sink_logits is not None:
        sink = sink_logits.to(wide)[:, None, None]
        top = torch.maximum(top, sink.detach())
    top = top.masked_fill(top == -torch.inf, 0)
    p = torch.exp(s - top)
    total = p.sum(-1, keepdim=True)
    if sink is not None:
        total = total + torch.exp(sink - top)
    empty = total == 0
    total = total.masked_fill(empty, 1)
    o = (p.view(B, Hkv, -1, S) @ v.to(wide).transpose(1, 2)).view(B, Hq, T, -1) / total
    lse = (top + torch.log(total)).masked_fill(empty, -torch.inf)
    return o.transpose(1, 2).to(q.dtype), lse.squeeze(-1).transpose(1, 2)
