"""Attention by torch's scaled_dot_product_attention."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.kernels.attention.mask import Mask, Tile, tiles

_MASK_CELLS = 1 << 26  # on a GPU, where other rows skip what nobody sees instead of masking it


def refuse(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, softcap: float | None,
    sink_logits: Tensor | None, need_lse: bool,
) -> str | None:  # fmt: skip
    """Why scaled_dot_product_attention cannot do this call, or None."""
    if softcap is not None:
        return "has no soft cap"
    if sink_logits is not None:
        return "has no sink logits"
    if need_lse:
        return "does not return the log-sum-exp with its gradient"
    if q.is_cuda and not (mask.causal and mask.plain and mask.window is None and mask.q_doc_ids is None):
        cells = q.shape[0] * q.shape[1] * k.shape[1]
        if cells > _MASK_CELLS and mask != Mask(False, None, 0, None, None, None, None):
            return f"would hold a mask of {cells:,} cells"
    return None


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, softcap: float | None,
    sink_logits: Tensor | None, need_lse: bool,
) -> tuple[Tensor, None]:  # fmt: skip
    """See `zoo.kernels.attention.attention`."""
    width, Dv = q.shape[-1], v.shape[-1]
    if width != Dv and q.device.type == "cpu":
        # with unequal widths the CPU falls back to a form with all T^2 scores in memory, 2-3 times slower
        pad = max(width, Dv)
        q, k, v = (F.pad(x, (0, pad - x.shape[-1])) for x in (q, k, v))
    cuts = tiles(q.shape[1], k.shape[1], mask.causal, mask.window, mask.sinks, mask.plain, fused=True)
    outputs = [_tile(tile.queries(q), tile.keys(k), tile.keys(v), mask, tile, scale) for tile in cuts]
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1))[..., :Dv], None


def _tile(q: Tensor, k: Tensor, v: Tensor, mask: Mask, tile: Tile, scale: float) -> Tensor:
    by_flag = mask.causal and mask.plain and mask.window is None and mask.q_doc_ids is None
    seen = None if by_flag else mask.visible(tile, q.device)
    empty = None
    if seen is not None:
        seen = seen[:, None]
        if not mask.plain or not mask.causal:
            # what a fused kernel makes of a row that sees nothing is not the same everywhere
            empty = ~seen.any(-1, keepdim=True)
            seen = seen | empty
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = k.shape[1] != q.shape[1]
    if grouped and seen is not None and q.is_cuda:
        # the CUDA kernels that take a mask take no grouped heads
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        grouped = False
    o = F.scaled_dot_product_attention(q, k, v, seen, is_causal=by_flag, scale=scale, enable_gqa=grouped)
    return (o if empty is None else o.masked_fill(empty, 0)).transpose(1, 2)
