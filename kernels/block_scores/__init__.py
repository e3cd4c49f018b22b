"""Score of each key block for each query, invisible blocks at -inf."""

from __future__ import annotations

from torch import Tensor

from zoo.kernels import gpu, native
from zoo.kernels.block_scores import chunked, reference
from zoo.kernels.block_scores.cost import flops
from zoo.kernels.dispatch import call, register_row

gpu.register_triton_row(
    "block_scores",
    "zoo.kernels.block_scores.triton:block_scores",
    refuse=lambda q, *rest: native.untraceable() or ("head dimensions above 256" if q.shape[3] > 256 else None),
)
register_row("block_scores", "chunked", chunked.block_scores, priority=10)
register_row("block_scores", "reference", reference.block_scores, priority=0)


def block_scores(
    q: Tensor,
    keys: Tensor,
    *,
    q_index: Tensor,
    k_index: Tensor,
    q_doc_ids: Tensor | None = None,
    k_doc_ids: Tensor | None = None,
    scale: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """scores[b, h, t, n] = scale * q[b, t, h] . keys[b, n, h // G], in fp32 (fp64 where q is).

    q: [B, T, Hq, D]; keys: [B, N, Hkv, D], one pooled key per block, Hkv dividing Hq. q_index [B, T]: order
    index of each query; k_index [B, N]: order index of each block's last token, -1 for no block. A block is
    visible where it ends before the query: 0 <= k_index < q_index, in the same document. -inf elsewhere.
    Returns [B, Hq, T, N].
    """
    return call("block_scores", backend, q, keys, q_index, k_index, q_doc_ids, k_doc_ids, scale)


__all__ = ["block_scores", "flops"]
