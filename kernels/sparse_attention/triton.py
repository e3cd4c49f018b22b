"""Attention over a BlockList on a GPU: forward.

    o[t] = sum_u p[t, u] v[u],  p = exp2(log2(e) (scale q . k + bias) - lse2)   over the keys listed for t

A row of a product is a query of one tile under one head; a tile's rows are its q_tile queries times the heads that
share its list, so that per-token lists of a GQA group still fill a product. Three ways, chosen from the sizes:

  tiles   a program takes rows of one tile and walks through its list with an online softmax
  split   the same, the list cut among several programs (decoding: few queries, long lists), results combined
  pairs   few rows in a tile but many tiles on a block (MoBA): the pairs (tile, slot) are sorted by block, a program
          takes the gathered rows of pairs of one block, and the n partial (o, lse) of a row are combined exactly
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels import gpu
from zoo.kernels.sparse_attention import fused
from zoo.kernels.sparse_attention.triton_backward import backward
from zoo.kernels.sparse_attention.triton_common import LN2, LOG2E, Call, keys_at, order_of, padded, rows_of, sees
from zoo.kernels.sparse_attention.triton_lists import by_block, groups_of

_PROGRAMS = 256  # enough to fill a GPU

attend = functools.partial(fused.sparse_attention, "triton")


@triton.jit(do_not_specialize=["scale", "window"])
def sparse_attention_forward(
    Q, K, V, Idx, Used, Offset, Pair, Groups, First, QIndex, KIndex, QDocs, KDocs, Bias, Out, Lse,
    scale, window, Tq, Tk, tiles, n, blocks, num_groups, pairs, splits,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, bias_h,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, LIST_HEADS: tl.constexpr, INDEX_HEADS: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    Q_TILE: tl.constexpr, KV_BLOCK: tl.constexpr, STRIDE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, DOCS: tl.constexpr, BIAS: tl.constexpr,
    PAIRS: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o and lse of M rows over a list, a share of it, or one block: written as they are or as a part of the row."""
    SHARED: tl.constexpr = HEADS // LIST_HEADS
    b = (tl.program_id(1) // LIST_HEADS).to(tl.int64)
    list_head = tl.program_id(1) % LIST_HEADS
    kv_head = list_head // (LIST_HEADS // KV_HEADS)
    xs = b * INDEX_HEADS + (list_head if INDEX_HEADS == LIST_HEADS else 0)
    group = tl.program_id(0)
    PIECES: tl.constexpr = (Q_TILE * SHARED + M - 1) // M
    tile = group // PIECES
    if PAIRS:  # noqa: SIM102 (only the outer question is answered while compiling)
        if tl.load(Groups + xs * num_groups + group) >= blocks:
            return
    query, head, slot, real, block = rows_of(
        Offset, Pair, Groups, First, group, xs, tile, 0 if PAIRS else group % PIECES * M, blocks, num_groups, pairs, n,
        Tq, list_head, Q_TILE, SHARED, M, PAIRS,
    )  # fmt: skip
    query = query.to(tl.int64)
    dims, dims_v = tl.arange(0, DP), tl.arange(0, DVP)
    q = tl.load(
        Q + (b * q_b + query * q_t + head * q_h)[:, None] + dims[None, :],
        mask=real[:, None] & (dims[None, :] < D), other=0.0,
    )  # fmt: skip
    q_order = tl.load(QIndex + b * Tq + query, mask=real, other=-1).to(tl.int32)
    q_doc = q_order.to(tl.int64)
    if DOCS:
        q_doc = tl.load(QDocs + b * Tq + query, mask=real, other=-1)
    Row = Idx + (xs * tiles + tile) * n
    if PAIRS:
        low, high = 0, KV_BLOCK
    else:
        length = tl.load(Used + xs * tiles + tile) * KV_BLOCK
        share = tl.cdiv(tl.cdiv(length, N), splits) * N
        low = tl.program_id(2) * share
        high = tl.minimum(low + share, length)
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, DVP], tl.float32)
    for j in range(low, high, N):
        key, listed = keys_at(Row, j, block, n, Tk, KV_BLOCK, STRIDE, N, PAIRS)
        key = key.to(tl.int64)
        k = tl.load(
            K + (b * k_b + kv_head * k_h + key * k_t)[None, :] + dims[:, None],
            mask=listed[None, :] & (dims[:, None] < D), other=0.0,
        )  # fmt: skip
        order, doc = order_of(KIndex, KDocs, b, Tk, key, listed, DOCS)
        s = tl.dot(q, k, input_precision=PRECISION) * (scale * LOG2E)
        if BIAS:
            bias = tl.load(Bias + (b * Tk + key) * bias_h + (kv_head if bias_h > 1 else 0), mask=listed, other=0.0)
            s += bias.to(tl.float32)[None, :] * LOG2E
        visible = sees(q_order[:, None], q_doc[:, None], order[None, :], doc[None, :], window, CAUSAL, WINDOW, DOCS)
        s = tl.where(visible, s, float("-inf"))
        new = tl.maximum(top, tl.max(s, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp2(s - safe[:, None])
        keep = tl.exp2(top - safe)
        total = total * keep + tl.sum(p, 1)
        v = tl.load(
            V + (b * v_b + kv_head * v_h + key * v_t)[:, None] + dims_v[None, :],
            mask=listed[:, None] & (dims_v[None, :] < DV), other=0.0,
        )  # fmt: skip
        acc = tl.dot(p.to(v.dtype), v, acc * keep[:, None], input_precision=PRECISION)
        top = new
    none = total == 0
    total = tl.where(none, 1.0, total)
    acc = acc / total[:, None]
    lse = tl.where(none, float("-inf"), (top + tl.log2(total)) * LN2)
    at = (b * Tq + query) * HEADS + head
    if PARTS:
        at = at * (n if PAIRS else splits) + (slot if PAIRS else tl.program_id(2))
    tl.store(Lse + at, lse, mask=real)
    out = Out + at[:, None] * DV + dims_v[None, :]
    tl.store(out, acc.to(Out.dtype.element_ty), mask=real[:, None] & (dims_v[None, :] < DV))


@triton.jit
def sparse_attention_combine(
    PartO, PartLse, Out, Lse, rows, parts, DV: tl.constexpr, DVP: tl.constexpr, M: tl.constexpr
):
    """o = sum_i exp(lse_i - lse) o_i over the parts of a row; a part that saw nothing may not even be written."""
    row = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    dims = tl.arange(0, DVP)
    real = row < rows
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, DVP], tl.float32)
    for i in range(parts):
        lse = tl.load(PartLse + row * parts + i, mask=real, other=float("-inf"))
        some = lse > float("-inf")
        o = tl.load(
            PartO + (row * parts + i)[:, None] * DV + dims[None, :],
            mask=some[:, None] & (dims[None, :] < DV), other=0.0,
        )  # fmt: skip
        new = tl.maximum(top, lse)
        safe = tl.where(new == float("-inf"), 0.0, new)
        keep = tl.exp2((top - safe) * LOG2E)
        weight = tl.exp2((lse - safe) * LOG2E)
        total = total * keep + weight
        acc = acc * keep[:, None] + weight[:, None] * o
        top = new
    none = total == 0
    total = tl.where(none, 1.0, total)
    acc = acc / total[:, None]
    tl.store(Lse + row, tl.where(none, float("-inf"), top + tl.log2(total) * LN2), mask=real)
    out = Out + row[:, None] * DV + dims[None, :]
    tl.store(out, acc.to(Out.dtype.element_ty), mask=real[:, None] & (dims[None, :] < DV))


# of num_stages, one is taken by the list: the address of a key waits for a block's number


def _configs(width: int, half: bool, rows: int) -> list[dict[str, int]]:
    if not half:
        return [{"M": 32, "N": 16 if width > 128 else 32, "num_warps": 8, "num_stages": 1}]
    if width > 128:
        return [{"M": 64, "N": 32, "num_warps": 8, "num_stages": 2}]
    if rows < 64:  # per-token lists, decoding: bound by memory
        return [
            {"M": 32, "N": 64, "num_warps": 4, "num_stages": 3},
            {"M": 32, "N": 32, "num_warps": 2, "num_stages": 4},
        ]
    return [{"M": 128, "N": 64, "num_warps": 8, "num_stages": 3}, {"M": 128, "N": 32, "num_warps": 8, "num_stages": 4}]


def _pair_configs(width: int, half: bool, rows: int) -> list[dict[str, int]]:
    if not half or width > 128:
        return _configs(width, half, rows)
    return [{"M": 128, "N": 32, "num_warps": 8, "num_stages": 3}, {"M": 64, "N": 64, "num_warps": 8, "num_stages": 2}]


def _splits(call: Call, programs: int) -> int:
    """Programs that share a list, each with at least 256 keys."""
    return max(1, min(_PROGRAMS // max(programs, 1), call.n * call.kv_block // 256, 64))


def forward(q, k, v, idx, q_index, k_index, q_doc_ids, k_doc_ids, k_bias, *options) -> tuple[Tensor, Tensor]:
    """See zoo.kernels.sparse_attention.fused."""
    call = Call(q, k, v, idx, q_index, k_index, q_doc_ids, k_doc_ids, k_bias, *options)
    q, wide = call.q, {"device": q.device, "dtype": torch.float32}
    o, lse = q.new_empty(*q.shape[:3], call.Dv), torch.empty(q.shape[:3], **wide)
    pairs = call.by_pairs
    tuned = call.options("sparse_attention_forward", _pair_configs if pairs else _configs, 128 if pairs else call.rows)
    heads, splits, lists = call.B * call.list_heads, 1, (None, None, None, None)
    used, num_groups = None, 0
    if pairs:
        offset, pair = by_block(call.idx, call.blocks)
        groups, first = groups_of(offset, call.rows, tuned["M"], call.tiles * call.n)
        lists, num_groups, parts = (offset, pair, groups, first), groups.shape[1], call.n
        grid = (num_groups, heads, 1)
    else:
        used = (call.idx >= 0).sum(-1, dtype=torch.int32)
        pieces = call.tiles * -(-call.rows // tuned["M"])
        parts = splits = _splits(call, pieces * heads)
        grid = (pieces, heads, splits)
    out, out_lse = o, lse
    if parts > 1:
        out, out_lse = (
            torch.empty(*q.shape[:3], parts, call.Dv, **wide),
            torch.full((*q.shape[:3], parts), float("-inf"), **wide),
        )
    sizes = (call.Tq, call.Tk, call.tiles, call.n, call.blocks, num_groups, call.tiles * call.n, splits)
    with gpu.launching(q):
        sparse_attention_forward[grid](
            q, call.k, call.v, call.idx, used, *lists, *call.masks(), out, out_lse, call.scale, call.window or 0,
            *sizes, *call.strides(), 0 if call.k_bias is None else call.k_bias.shape[2], **call.constants(),
            PAIRS=pairs, PARTS=parts > 1, **tuned,
        )  # fmt: skip
        if parts > 1:
            rows = lse.numel()
            size = 32 if call.Dv <= 64 else 16
            sparse_attention_combine[(triton.cdiv(rows, size),)](
                out, out_lse, o, lse, rows, parts, DV=call.Dv, DVP=padded(call.Dv), M=size, num_warps=4
            )
    return o, lse


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    """The tuned shapes, forward and backward, for compiling without a GPU."""

    def both(B, Tq, Tk, Hq, Hkv, Hs, D, q_tile, kv_block, n, train=True):
        def make(*shape, dtype=torch.bfloat16):
            return torch.empty(shape, device="meta", dtype=dtype)

        q, k, v = make(B, Tq, Hq, D), make(B, Tk, Hkv, D), make(B, Tk, Hkv, D)
        idx = make(B, Hs, -(-Tq // q_tile), n, dtype=torch.int32)
        order = make(B, Tq, dtype=torch.int64), make(B, Tk, dtype=torch.int64)
        args = (q, k, v, idx, *order, None, None, None, q_tile, kv_block, kv_block, True, None, D**-0.5)

        def run() -> None:
            o, lse = forward(*args)
            if train:
                backward(o, None, o, lse, *args)

        return run

    yield "tokens_of_group_64", both(1, 4096, 4096, 32, 2, 2, 128, 1, 64, 16)
    yield "tokens_of_group_1", both(1, 4096, 4096, 64, 1, 1, 128, 1, 1, 2048)
    yield "tiles_128_d128", both(1, 4096, 4096, 32, 8, 32, 128, 128, 128, 8)
    yield "tiles_64_d64", both(1, 4096, 4096, 16, 16, 16, 64, 64, 64, 16)
    yield "key_major_d128", both(1, 8192, 8192, 16, 4, 16, 128, 1, 256, 4)
    yield "tiles_128_d256", both(1, 4096, 4096, 8, 2, 8, 256, 128, 128, 8)
    yield "decode_d128", both(8, 1, 32768, 32, 8, 8, 128, 1, 64, 64, train=False)


__all__ = ["attend", "backward", "forward", "launches"]
