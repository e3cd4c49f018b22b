"""Dense softmax attention with grouped heads, windows, sinks, documents, order indices, soft caps and blocks."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from zoo import row
from zoo.kernels import flash_attn, gpu, slices, xformers
from zoo.kernels import native as native_core
from zoo.kernels.attention import chunked, flex, native, reference, sdpa
from zoo.kernels.attention.cost import attention_flops, two_copies_kept
from zoo.kernels.attention.mask import QUERY_TILE, Mask, TwoCopies
from zoo.kernels.dispatch import call, register_row
from zoo.kernels.merge_lse import merge_lse

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
    q_doc_ids: Tensor | TwoCopies | None = None,
    k_doc_ids: Tensor | TwoCopies | None = None,
    sink_logits: Tensor | None = None,
    need_lse: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """o_i = sum_j softmax_j(scale q_i . k_j) v_j over the keys j that i may see.

    q: [B, T, Hq, D]; k: [B, S, Hkv, D]; v: [B, S, Hkv, Dv], query head h reading head h // (Hq / Hkv).
    q_index [B, T] and k_index [B, S]: order of the tokens in their row, -1 for an empty cache slot; without
    them both count from 0. Key j is visible where j <= i (`causal`), |i - j| < `window` or j < `sinks`, and
    the document ids are equal; `TwoCopies` in place of the ids (in both places) is the mask of block diffusion.
    `scale` defaults to D^-0.5; `softcap` c replaces a score s by c tanh(s / c); `sink_logits` [Hq] is one more
    score per head that takes weight and gives no value.
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
    if isinstance(q_doc_ids, TwoCopies):
        if not causal or window is not None or q_index is not None or T != S:
            raise ValueError("two copies of a row go with causal attention of the whole row: no window, no indices")
        options = {"scale": scale, "softcap": softcap, "backend": backend}
        return _two_copies(q, k, v, q_doc_ids, sink_logits, need_lse, options)
    if q_doc_ids is not None and k_doc_ids is None:
        k_doc_ids = q_doc_ids
    if isinstance(k_doc_ids, TwoCopies):
        raise ValueError("two copies of a row are queries and keys: give them for both")
    if (part := row.current()) is not None and T == S:  # more keys than queries: they were gathered already
        reach = None if sinks else window
        order = (q_index, k_index)
        k, v, q_index, k_index, k_doc_ids = slices.attention_keys(part, q, k, v, causal, *order, k_doc_ids, reach)
        S = k.shape[1]
    if window is not None and q_index is None and window >= S:
        window, sinks = None, 0  # everything is inside
    mask = Mask(causal, window, sinks if window is not None else 0, q_index, k_index, q_doc_ids, k_doc_ids)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return call("attention", backend, q, k, v, mask, scale, softcap, sink_logits, need_lse)


def _two_copies(
    q: Tensor, k: Tensor, v: Tensor, copies: TwoCopies, sink_logits: Tensor | None, need_lse: bool,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    # n (n + block) scores, not 4 n^2: a noisy token's own block and the clean tokens before it are two sets of keys
    (B, T), block, docs = q.shape[:2], copies.block, copies.doc_ids
    n = T // 2
    if T % 2 or n % block:
        raise ValueError(f"{T} tokens are not two copies of whole blocks of {block}")
    index = torch.arange(n, device=q.device).repeat(B, 1)
    start = index // block * block
    # laid out once, not by each call that keeps them for backward
    (q_noisy, q_clean), (k_noisy, k_clean), (v_noisy, v_clean) = (
        (half.contiguous() for half in x.split(n, 1)) for x in (q, k, v)
    )

    def past(q: Tensor, last: Tensor | None, sinks: Tensor | None, need_lse: bool):
        k_index = None if last is None else index
        return attention(
            q, k_clean, v_clean, q_index=last, k_index=k_index, q_doc_ids=docs, sink_logits=sinks, need_lse=need_lse,
            **options,
        )  # fmt: skip

    def own(x: Tensor) -> Tensor:
        return x.reshape(-1, block, *x.shape[2:])

    clean, clean_lse = past(q_clean, None if copies.causal else start + block - 1, sink_logits, need_lse)
    before, before_lse = past(q_noisy, start - 1, None, True)
    inside, inside_lse = attention(
        own(q_noisy), own(k_noisy), own(v_noisy), causal=False, q_doc_ids=None if docs is None else own(docs),
        sink_logits=sink_logits, need_lse=True, **options,
    )  # fmt: skip
    lses = [x.reshape(before.shape[:3]) for x in (before_lse, inside_lse) if x is not None]
    noisy, noisy_lse = merge_lse([before, inside.view_as(before)], lses)
    return torch.cat([noisy, clean], 1), None if clean_lse is None else torch.cat([noisy_lse, clean_lse], 1)


__all__ = ["QUERY_TILE", "TwoCopies", "attention", "attention_flops", "two_copies_kept"]
