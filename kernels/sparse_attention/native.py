"""Attention over a BlockList by the C core: no key is copied that is not listed, nothing is computed where nothing is
visible, and memory is linear in the length. An engine of fused.py."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from zoo.kernels import native
from zoo.kernels.block_list import BlockList
from zoo.kernels.sparse_attention import fused

attend = functools.partial(fused.sparse_attention, "native")


def refuse(q: Tensor, k: Tensor, v: Tensor, blocks: BlockList, *masks: object) -> str | None:
    """Why the core cannot do this call, or None."""
    return native.untraceable()


def keys_first(tiles: int, rows: int, keys: int, slots: int, kv_block: int) -> bool:
    """Is it worth packing all keys of a head and sorting the tiles of `rows` rows by block, where each could gather
    its listed keys? (Fitted.) Blocks narrower than a vector waste the products, and few rows gather dearly."""
    if kv_block < (8 if rows < 4 else 16):
        return False
    return tiles * slots * kv_block * min(kv_block, 16) >= 64 * keys


def _prepared(q: Tensor, k: Tensor, v: Tensor, idx: Tensor, masks: tuple[Tensor | None, ...], options: tuple):
    """Tensors and integers as the core takes them."""
    q_tile, kv_block, stride, causal, window, scale = options
    real = torch.float64 if q.dtype == torch.float64 else torch.float32
    half = q.dtype == k.dtype == v.dtype == torch.bfloat16  # widened row by row: of a long cache little is read
    tensors = [(x if half else x.to(real)).contiguous() for x in (q, k, v)] + [idx.int().contiguous()]
    tensors += [None if x is None else x.long().contiguous() for x in masks[:4]]
    tensors.append(None if masks[4] is None else masks[4].to(real).contiguous())
    (B, Tq, H, D), (_, Tk, G, Dv), (_, Hs, N, n) = q.shape, v.shape, idx.shape
    rows = q_tile * (H // G if Hs <= G else 1)
    sizes = (B, Tq, Tk, H, G, D, Dv, Hs, N, n, q_tile, kv_block, stride, 0 if masks[4] is None else masks[4].shape[2])
    rules = (int(causal), -1 if window is None else max(window, 0), int(keys_first(N, rows, Tk, n, kv_block)))
    return real, tensors, (*sizes, *rules, int(half), float(scale))


def forward(
    q: Tensor, k: Tensor, v: Tensor, idx: Tensor, q_index: Tensor, k_index: Tensor, q_doc_ids: Tensor | None,
    k_doc_ids: Tensor | None, k_bias: Tensor | None, *options,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See fused.py."""
    masks = (q_index, k_index, q_doc_ids, k_doc_ids, k_bias)
    real, tensors, sizes = _prepared(q, k, v, idx, masks, options)
    o, lse = q.new_empty(*q.shape[:3], v.shape[3], dtype=real), q.new_empty(q.shape[:3], dtype=real)
    native.run("sparse_attention", "forward", real, *tensors, o, lse, *sizes)
    return o.to(q.dtype), lse


def backward(
    grad_o: Tensor, grad_lse: Tensor | None, o: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, idx: Tensor,
    q_index: Tensor, k_index: Tensor, q_doc_ids: Tensor | None, k_doc_ids: Tensor | None, k_bias: Tensor | None,
    *options,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """See fused.py."""
    masks = (q_index, k_index, q_doc_ids, k_doc_ids, k_bias)
    real, tensors, sizes = _prepared(q, k, v, idx, masks, options)
    kept = [None if x is None else x.to(real).contiguous() for x in (o, lse, grad_o, grad_lse)]
    dq, dk, dv = (torch.zeros(x.shape, dtype=real) for x in (q, k, v))
    dbias = None if k_bias is None else dq.new_zeros(q.shape[0], k.shape[2], k.shape[1])
    native.run("sparse_attention", "backward", real, *tensors, *kept, dq, dk, dv, dbias, *sizes)
    if dbias is None:
        dbias = q.new_empty(0)
    else:
        dbias = (dbias.sum(1, keepdim=True) if k_bias.shape[2] == 1 else dbias).transpose(1, 2).to(k_bias.dtype)
    return *(g.to(x.dtype) for g, x in zip((dq, dk, dv), (q, k, v))), dbias.contiguous()
