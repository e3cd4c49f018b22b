"""Attention over the union of listed key blocks."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.kernels import gpu
from zoo.kernels import native as native_core
from zoo.kernels.block_list import BlockList
from zoo.kernels.dispatch import call, register_row
from zoo.kernels.sparse_attention import chunked, native, reference
from zoo.kernels.sparse_attention.cost import flops

register_row(
    "sparse_attention", "native", native.attend, priority=20, devices=("cpu",),
    missing=functools.partial(native_core.missing, "sparse_attention"), refuse=native.refuse,
)  # fmt: skip
gpu.register_triton_row(
    "sparse_attention", "zoo.kernels.sparse_attention.triton:attend",
    refuse=lambda q, k, v, *masks: (
        native_core.untraceable() or ("head dimensions above 256" if max(q.shape[3], v.shape[3]) > 256 else None)
    ),
)  # fmt: skip
register_row("sparse_attention", "chunked", chunked.sparse_attention, priority=10)
register_row("sparse_attention", "reference", reference.sparse_attention, priority=0)


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: BlockList,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    q_index: Tensor | None = None,
    k_index: Tensor | None = None,
    q_doc_ids: Tensor | None = None,
    k_doc_ids: Tensor | None = None,
    k_bias: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """o[t] = softmax(scale * q[t] . K + k_bias) V over the keys that are listed for t and visible to it.

    q: [B, Tq, Hq, D]; k: [B, Tk, Hkv, D]; v: [B, Tk, Hkv, Dv], Hkv dividing Hq; blocks: see `BlockList`, its
    idx is [B, 1 | Hkv | Hq, ceil(Tq / q_tile), n] and its ids count memory slots of k. q_index [B, Tq],
    k_index [B, Tk]: order indices that causality (k_index <= q_index) and `window` (q_index - k_index <
    window) compare, default 0.. in memory order, k_index = -1 for an empty slot; q_doc_ids, k_doc_ids: only
    equal ids see each other; k_bias: [B, Tk, 1 | Hkv], added to the logits; scale: default D^-1/2.
    Returns o [B, Tq, Hq, Dv] in q's dtype and lse [B, Tq, Hq] in fp32 (fp64 where q is). A query that sees no
    key has o = 0, lse = -inf. Differentiable in q, k, v, k_bias through o and lse.
    """
    B, Tq, Hq, D = q.shape
    Tk, Hkv = k.shape[1:3]
    idx = blocks.idx
    if Hq % Hkv or idx.shape[1] not in (1, Hkv, Hq):
        raise ValueError(f"heads do not fit: {Hq} query, {Hkv} key and {idx.shape[1]} list heads")
    if idx.shape[0] != B or idx.shape[2] != -(-Tq // blocks.q_tile):
        raise ValueError(f"idx of shape {tuple(idx.shape)} does not serve {B} rows of {Tq} queries in {blocks.q_tile}s")
    if idx.shape[3] == 0:  # no slot at all is one empty slot
        blocks = BlockList(F.pad(idx, (0, 1), value=-1), blocks.q_tile, blocks.kv_block, blocks.stride)
    if q_index is None:
        q_index = torch.arange(Tq, device=q.device).expand(B, Tq)
    if k_index is None:
        k_index = torch.arange(Tk, device=q.device).expand(B, Tk)
    scale = D**-0.5 if scale is None else scale
    masks = (causal, window, scale, q_index, k_index, q_doc_ids, k_doc_ids, k_bias)
    return call("sparse_attention", backend, q, k, v, blocks, *masks)


__all__ = ["BlockList", "flops", "sparse_attention"]
