"""Dense softmax attention with grouped heads, windows, sinks, documents, order indices and soft caps."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from zoo.kernels import flash_attn, gpu, xformers
from zoo.kernels import native as native_core
from zoo.kernels.attention import chunked, flex, native, reference, sdpa
from zoo.kernels.attention.cost import attention_flops
from zoo.kernels.attention.mask import QUERY_TILE, Mask
from zoo.kernels.dispatch import call, register_row

register_row("attention", "sdpa", sdpa.attention, priority=20, refuse=sdpa.refuse)
register_row("attention", "flash_attn", flash_attn.attention, refuse=flash_attn.refuse, **flash_attn.CONSTRAINTS)
register_row("attention", "xformers", xformers.attention, refuse=xformers.refuse, **xformers.CONSTRAINTS)
register_row(
    "attention", "native", native.attention, priority=22, devices=("cpu",), dtypes=(torch.float32, torch.float64),
    missing=functools.partial(native_core.missing, "attention"), refuse=native.refuse,
)  # fmt: skip
# compiled anew for each shape, a minute the first time: on a CPU only where it is asked for
register_row(
    "attention", "flex", flex.attention, priority=12, devices=("cuda",), by_name=("cpu",),
    dtypes=flex.DTYPES, unfit=functools.partial(gpu.checked, "attention", "flex"), refuse=flex.refuse,
)  # fmt: skip
register_row("attention", "chunked", chunked.attention, priority=10)
register_row("attention", "reference", reference.attention, priority=0)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    sinks: int = 0,
    scale: float | None = None,
    softcap: float | None = None,
    q_index: Tensor | None = None,
    k_index: Tensor | None = None,
    q_doc_ids: Tensor | None = None,
    k_doc_ids: Tensor | None = None,
    sink_logits: Tensor | None = None,
    need_lse: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """o_i = sum_j softmax_j(scale q_i . k_j) v_j over the keys j that i may see.

    q: [B, T, Hq, D]; k: [B, S, Hkv, D]; v: [B, S, Hkv, Dv], query head h reading head h // (Hq / Hkv).
    q_index [B, T] and k_index [B, S]: order of the tokens in their row, -1 for an empty cache slot; without
    them both count from 0. Key j is visible where j <= i (`causal`), |i - j| < `window` or j < `sinks`, and
    the document ids are equal. `scale` defaults to D^-0.5; `softcap` c replaces a score s by c tanh(s / c);
    `sink_logits` [Hq] is one more score per head that takes weight and gives no value.
    Returns o [B, T, Hq, Dv] in q's dtype and, with `need_lse`, the log of the softmax denominator (sink logit
    included) [B, T, Hq] in fp32 (fp64 for fp64), differentiable; else None. A query that sees nothing gets
    o = 0 and lse = -inf.
    """
    (T, Hq), (S, Hkv) = q.shape[1:3], k.shape[1:3]
    if Hq % Hkv:
        raise ValueError(f"the {Hq} query heads must be a multiple of the {Hkv} key heads")
    if (q_index is None) != (k_index is None):
        raise ValueError("q_index and k_index go together: give both or neither")
    if q_index is None and (causal or window is not None) and T != S:
        raise ValueError(f"{T} queries and {S} keys: a causal or window mask needs q_index and k_index")
    if q_doc_ids is not None and k_doc_ids is None:
        k_doc_ids = q_doc_ids
    if window is not None and q_index is None and window >= S:
        window, sinks = None, 0  # everything is inside
    mask = Mask(causal, window, sinks if window is not None else 0, q_index, k_index, q_doc_ids, k_doc_ids)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return call("attention", backend, q, k, v, mask, scale, softcap, sink_logits, need_lse)


__all__ = ["QUERY_TILE", "attention", "attention_flops"]
