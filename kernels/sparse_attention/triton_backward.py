"""Attention over a BlockList on a GPU: backward.

    ds = p (do . v - shift),  shift = sum(do o) - dlse;   dq = scale ds K,  dk = scale ds^T q,  dv = p^T do

with p recomputed from lse. dq is taken as the forward was: by tiles, or by pairs with a sum over the n parts of a row.
dk and dv are taken cell by cell of keys (triton_lists.invert): one program reads all rows that listed its keys, so
that every sum is made by one program in one order, without atomics and alike in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels import gpu
from zoo.kernels.sparse_attention.triton_common import LOG2E, Call, keys_at, order_of, padded, rows_of, sees
from zoo.kernels.sparse_attention.triton_lists import by_block, groups_of, invert


@triton.jit
def sparse_attention_backward_shift(
    DO, Out, DLse, Shift, rows, DV: tl.constexpr, DVP: tl.constexpr, M: tl.constexpr, LSE: tl.constexpr
):
    """shift = sum(do o) - dlse of every row."""
    row = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    dims = tl.arange(0, DVP)
    real = row < rows
    mask = real[:, None] & (dims[None, :] < DV)
    do = tl.load(DO + row[:, None] * DV + dims[None, :], mask=mask, other=0.0).to(tl.float32)
    o = tl.load(Out + row[:, None] * DV + dims[None, :], mask=mask, other=0.0).to(tl.float32)
    shift = tl.sum(do * o, 1)
    if LSE:
        shift -= tl.load(DLse + row, mask=real, other=0.0).to(tl.float32)
    tl.store(Shift + row, shift, mask=real)


@triton.jit(do_not_specialize=["scale", "window"])
def sparse_attention_backward_query(
    Q, K, V, Idx, Used, Offset, Pair, Groups, First, QIndex, KIndex, QDocs, KDocs, Bias, DO, Lse, Shift, DQ,
    scale, window, Tq, Tk, tiles, n, blocks, num_groups, pairs,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, bias_h,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, LIST_HEADS: tl.constexpr, INDEX_HEADS: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    Q_TILE: tl.constexpr, KV_BLOCK: tl.constexpr, STRIDE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, DOCS: tl.constexpr, BIAS: tl.constexpr,
    PAIRS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of M rows, or the part of it that belongs to one block."""
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
    at = (b * Tq + query) * HEADS + head
    q = tl.load(
        Q + (b * q_b + query * q_t + head * q_h)[:, None] + dims[None, :],
        mask=real[:, None] & (dims[None, :] < D), other=0.0,
    )  # fmt: skip
    do = tl.load(DO + at[:, None] * DV + dims_v[None, :], mask=real[:, None] & (dims_v[None, :] < DV), other=0.0)
    lse = tl.load(Lse + at, mask=real, other=0.0)
    lse = tl.where(lse == float("-inf"), 0.0, lse) * LOG2E
    shift = tl.load(Shift + at, mask=real, other=0.0)
    q_order = tl.load(QIndex + b * Tq + query, mask=real, other=-1).to(tl.int32)
    q_doc = q_order.to(tl.int64)
    if DOCS:
        q_doc = tl.load(QDocs + b * Tq + query, mask=real, other=-1)
    Row = Idx + (xs * tiles + tile) * n
    high = KV_BLOCK if PAIRS else tl.load(Used + xs * tiles + tile) * KV_BLOCK
    acc = tl.zeros([M, DP], tl.float32)
    for j in range(0, high, N):
        key, listed = keys_at(Row, j, block, n, Tk, KV_BLOCK, STRIDE, N, PAIRS)
        key = key.to(tl.int64)
        k = tl.load(
            K + (b * k_b + kv_head * k_h + key * k_t)[:, None] + dims[None, :],
            mask=listed[:, None] & (dims[None, :] < D), other=0.0,
        )  # fmt: skip
        v = tl.load(
            V + (b * v_b + kv_head * v_h + key * v_t)[:, None] + dims_v[None, :],
            mask=listed[:, None] & (dims_v[None, :] < DV), other=0.0,
        )  # fmt: skip
        order, doc = order_of(KIndex, KDocs, b, Tk, key, listed, DOCS)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
        if BIAS:
            bias = tl.load(Bias + (b * Tk + key) * bias_h + (kv_head if bias_h > 1 else 0), mask=listed, other=0.0)
            s += bias.to(tl.float32)[None, :] * LOG2E
        visible = sees(q_order[:, None], q_doc[:, None], order[None, :], doc[None, :], window, CAUSAL, WINDOW, DOCS)
        p = tl.exp2(tl.where(visible, s - lse[:, None], float("-inf")))
        ds = p * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - shift[:, None])
        acc = tl.dot(ds.to(k.dtype), k, acc, input_precision=PRECISION)
    if PAIRS:
        at = at * n + slot
    out = DQ + at[:, None] * D + dims[None, :]
    tl.store(out, (acc * scale).to(DQ.dtype.element_ty), mask=real[:, None] & (dims[None, :] < D))


@triton.jit
def sparse_attention_backward_sum(
    Parts, Idx, DQ, rows, Tq, tiles, n, HEADS: tl.constexpr, LIST_HEADS: tl.constexpr, INDEX_HEADS: tl.constexpr,
    Q_TILE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """dq of a row is the sum of its parts; the part of an empty slot was not written."""
    row = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    dims = tl.arange(0, DP)
    real = row < rows
    tile = row // HEADS % Tq // Q_TILE
    list_head = row % HEADS // (HEADS // LIST_HEADS)
    xs = row // HEADS // Tq * INDEX_HEADS + (list_head if INDEX_HEADS == LIST_HEADS else 0)
    acc = tl.zeros([M, DP], tl.float32)
    for i in range(n):
        some = tl.load(Idx + (xs * tiles + tile) * n + i, mask=real, other=-1) >= 0
        acc += tl.load(
            Parts + (row * n + i)[:, None] * D + dims[None, :], mask=some[:, None] & (dims[None, :] < D), other=0.0
        )
    out = DQ + row[:, None] * D + dims[None, :]
    tl.store(out, acc.to(DQ.dtype.element_ty), mask=real[:, None] & (dims[None, :] < D))


@triton.jit(do_not_specialize=["scale", "window"])
def sparse_attention_backward_key(
    Q, K, V, Offset, Tile, Bits, QIndex, KIndex, QDocs, KDocs, Bias, DO, Lse, Shift, DK, DV_, DBias,
    scale, window, Tq, Tk, cells, entries,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, bias_h,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, LIST_HEADS: tl.constexpr, INDEX_HEADS: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    Q_TILE: tl.constexpr, CELL: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, DOCS: tl.constexpr, BIAS: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk, dv and the bias's gradient of N keys of a cell under one key head. Logits are formed transposed, [N, M]."""
    SHARED: tl.constexpr = HEADS // LIST_HEADS
    LISTS: tl.constexpr = LIST_HEADS // KV_HEADS
    b = (tl.program_id(1) // KV_HEADS).to(tl.int64)
    kv_head = tl.program_id(1) % KV_HEADS
    PIECES: tl.constexpr = CELL // N
    cell = tl.program_id(0) // PIECES
    inside = tl.program_id(0) % PIECES * N + tl.arange(0, N)
    key = (cell * CELL + inside).to(tl.int64)
    exists = key < Tk
    dims, dims_v = tl.arange(0, DP), tl.arange(0, DVP)
    mask, mask_v = exists[:, None] & (dims[None, :] < D), exists[:, None] & (dims_v[None, :] < DV)
    k = tl.load(K + (b * k_b + kv_head * k_h + key * k_t)[:, None] + dims[None, :], mask=mask, other=0.0)
    v = tl.load(V + (b * v_b + kv_head * v_h + key * v_t)[:, None] + dims_v[None, :], mask=mask_v, other=0.0)
    order, doc = order_of(KIndex, KDocs, b, Tk, key, exists, DOCS)
    bias = tl.zeros([N], tl.float32)
    if BIAS:
        bias += tl.load(Bias + (b * Tk + key) * bias_h + (kv_head if bias_h > 1 else 0), mask=exists, other=0.0)
    dk = tl.zeros([N, DP], tl.float32)
    dv = tl.zeros([N, DVP], tl.float32)
    dbias = tl.zeros([N], tl.float32)
    for i in range(LISTS):
        list_head = kv_head * LISTS + i
        xs = b * INDEX_HEADS + (list_head if INDEX_HEADS == LIST_HEADS else 0)
        begin = tl.load(Offset + xs * (cells + 1) + cell)
        end = tl.load(Offset + xs * (cells + 1) + cell + 1)
        for j in range(0, (end - begin) * (Q_TILE * SHARED), M):
            row = j + tl.arange(0, M)
            entry = xs * entries + begin + row // (Q_TILE * SHARED)
            real = row < (end - begin) * (Q_TILE * SHARED)
            query = tl.load(Tile + entry, mask=real, other=0) * Q_TILE + row % (Q_TILE * SHARED) // SHARED
            real = real & (query < Tq)
            query = query.to(tl.int64)
            head = list_head * SHARED + row % SHARED
            at = (b * Tq + query) * HEADS + head
            q = tl.load(
                Q + (b * q_b + query * q_t + head * q_h)[:, None] + dims[None, :],
                mask=real[:, None] & (dims[None, :] < D), other=0.0,
            )  # fmt: skip
            do = tl.load(
                DO + at[:, None] * DV + dims_v[None, :], mask=real[:, None] & (dims_v[None, :] < DV), other=0.0
            )
            lse = tl.load(Lse + at, mask=real, other=0.0)
            lse = tl.where(lse == float("-inf"), 0.0, lse) * LOG2E
            shift = tl.load(Shift + at, mask=real, other=0.0)
            q_order = tl.load(QIndex + b * Tq + query, mask=real, other=-1).to(tl.int32)
            q_doc = q_order.to(tl.int64)
            if DOCS:
                q_doc = tl.load(QDocs + b * Tq + query, mask=real, other=-1)
            visible = sees(q_order[None, :], q_doc[None, :], order[:, None], doc[:, None], window, CAUSAL, WINDOW, DOCS)
            visible = visible & real[None, :]
            if MASKED:
                bits = tl.load(Bits + entry, mask=real, other=0)
                visible = visible & (((bits[None, :] >> inside[:, None]) & 1) != 0)
            s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * LOG2E) + bias[:, None] * LOG2E
            p = tl.exp2(tl.where(visible, s - lse[None, :], float("-inf")))
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
            ds = p * (tl.dot(v, tl.trans(do), input_precision=PRECISION) - shift[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
            if BIAS:
                dbias += tl.sum(ds, 1)
    out = (b * Tk + key) * KV_HEADS + kv_head
    tl.store(DK + out[:, None] * D + dims[None, :], (dk * scale).to(DK.dtype.element_ty), mask=mask)
    tl.store(DV_ + out[:, None] * DV + dims_v[None, :], dv.to(DV_.dtype.element_ty), mask=mask_v)
    if BIAS:
        tl.store(DBias + out, dbias, mask=exists)


def _query_configs(width: int, half: bool, rows: int) -> list[dict[str, int]]:
    if not half:
        return [{"M": 32, "N": 16 if width > 128 else 32, "num_warps": 8, "num_stages": 1}]
    if width > 128:
        return [{"M": 64, "N": 32, "num_warps": 8, "num_stages": 1}]
    if rows < 64:
        return [{"M": 32, "N": 64, "num_warps": 4, "num_stages": 3}]
    return [{"M": 128, "N": 32, "num_warps": 8, "num_stages": 3}, {"M": 128, "N": 64, "num_warps": 8, "num_stages": 2}]


def _key_configs(width: int, half: bool, rows: int) -> list[dict[str, int]]:
    if not half:
        return [{"M": 32, "N": 16 if width > 128 else 32, "num_warps": 8, "num_stages": 1}]
    if width > 128:
        return [{"M": 32, "N": 64, "num_warps": 8, "num_stages": 1}]
    return [{"M": 32, "N": 128, "num_warps": 8, "num_stages": 2}, {"M": 64, "N": 128, "num_warps": 8, "num_stages": 2}]


def backward(
    grad_o, grad_lse, o, lse, q, k, v, idx, q_index, k_index, q_doc_ids, k_doc_ids, k_bias, *options
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See zoo.kernels.sparse_attention.fused."""
    call = Call(q, k, v, idx, q_index, k_index, q_doc_ids, k_doc_ids, k_bias, *options)
    q, k, v, o, lse, grad_o = call.q, call.k, call.v, *(x.contiguous() for x in (o, lse, grad_o))
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    wide = {"device": q.device, "dtype": torch.float32}
    shift, rows = torch.empty(lse.shape, **wide), lse.numel()
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    # one for each key head, also where they share a bias
    bias = call.k_bias
    dbias = None if bias is None else torch.empty(call.B, call.Tk, call.Hkv, **wide)
    bias_heads = 0 if bias is None else bias.shape[2]
    constants, size = call.constants(), 32 if max(call.D, call.Dv) <= 64 else 16
    with gpu.launching(q):
        sparse_attention_backward_shift[(triton.cdiv(rows, size),)](
            grad_o, o, grad_lse, shift, rows, DV=call.Dv, DVP=padded(call.Dv), M=size, LSE=grad_lse is not None
        )
        rest = (grad_o, lse, shift)
        _query(call, rest, dq, bias_heads, constants, size)
        inverted = invert(call.idx, call.Tk, call.kv_block, call.stride)
        tuned = call.options("sparse_attention_backward_key", _key_configs, 128)
        # the largest power of two that divides a cell
        tuned["N"] = min(tuned["N"], inverted.size & -inverted.size)
        cells = inverted.offset.shape[1] - 1
        lists = (inverted.offset, inverted.tile, inverted.bits)
        del constants["KV_BLOCK"], constants["STRIDE"]
        sparse_attention_backward_key[(cells * (inverted.size // tuned["N"]), call.B * call.Hkv)](
            q, k, v, *lists, *call.masks(), *rest, dk, dv, dbias, call.scale, call.window or 0,
            call.Tq, call.Tk, cells, inverted.tile.shape[1], *call.strides(), bias_heads,
            **constants, CELL=inverted.size, MASKED=inverted.bits is not None, **tuned,
        )  # fmt: skip
    if bias is None:
        return dq, dk, dv, q.new_empty(0)
    return dq, dk, dv, (dbias if bias_heads == call.Hkv else dbias.sum(2, keepdim=True)).to(bias.dtype)


def _query(call: Call, rest: tuple[Tensor, ...], dq: Tensor, bias_heads: int, constants: dict, size: int) -> None:
    pairs = call.by_pairs
    tuned = call.options("sparse_attention_backward_query", _query_configs, 128 if pairs else call.rows)
    heads, out, used, lists, num_groups = call.B * call.list_heads, dq, None, (None, None, None, None), 0
    if pairs:
        offset, pair = by_block(call.idx, call.blocks)
        groups, first = groups_of(offset, call.rows, tuned["M"], call.tiles * call.n)
        lists, num_groups = (offset, pair, groups, first), groups.shape[1]
        out = torch.empty(*dq.shape[:3], call.n, call.D, device=dq.device, dtype=torch.float32)
        grid = (num_groups, heads)
    else:
        used = (call.idx >= 0).sum(-1, dtype=torch.int32)
        grid = (call.tiles * -(-call.rows // tuned["M"]), heads)
    sparse_attention_backward_query[grid](
        call.q, call.k, call.v, call.idx, used, *lists, *call.masks(), *rest, out, call.scale, call.window or 0,
        call.Tq, call.Tk, call.tiles, call.n, call.blocks, num_groups, call.tiles * call.n, *call.strides(),
        bias_heads, **constants, PAIRS=pairs, **tuned,
    )  # fmt: skip
    if pairs:
        rows = dq.numel() // call.D
        sparse_attention_backward_sum[(triton.cdiv(rows, size),)](
            out, call.idx, dq, rows, call.Tq, call.tiles, call.n, HEADS=call.Hq, LIST_HEADS=call.list_heads,
            INDEX_HEADS=call.Hs, Q_TILE=call.q_tile, D=call.D, DP=padded(call.D), M=size,
        )  # fmt: skip
