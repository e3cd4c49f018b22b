"""Block scores and the choice of the best in one kernel: the table of scores never leaves the chip.

A program keeps the k best (score, block) of each of its rows while it passes over the blocks. Both are packed in one
integer, the score's bits in an order that integers share with floats above the block counted down, so that the
greatest integer is the best score and among equal ones the lowest block, and one bitonic merge does the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.kernels import gpu
from zoo.kernels.block_scores.triton import prepared, products, queries_of, seen_by
from zoo.kernels.select_blocks.cost import flops

LAST = tl.constexpr(2147483647)
NOTHING = tl.constexpr(-(2**63))


@triton.jit
def packed(score, block):
    """(score, block) as an int64 that orders by score, then by the lower block."""
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)  # -0 equals 0
    bits = bits ^ ((bits >> 31) & LAST)
    return (bits.to(tl.int64) << 32) | (block ^ LAST).to(tl.int64)  # LAST - block


@triton.jit(do_not_specialize=["scale"])
def select_blocks_forward(
    Q, Keys, QIndex, KIndex, QDocs, KDocs, Forced, Visible, Out, scale, T, blocks, slots,
    q_b, q_t, q_h, k_b, k_n, k_h, f_b, f_h, f_t, f_n, v_b, v_h, v_t, v_n,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, KEPT: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, DOCS: tl.constexpr, FORCED: tl.constexpr, VISIBLE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Lists of M rows, `slots` of the KEPT best."""
    b = (tl.program_id(1) // KV_HEADS).to(tl.int64)
    kv_head = tl.program_id(1) % KV_HEADS
    q, order, doc, token, head, real = queries_of(
        Q, QIndex, QDocs, b, kv_head, tl.program_id(0) * M, T, q_b, q_t, q_h, HEADS // KV_HEADS, D, DP, M, DOCS
    )
    best = tl.full([M, KEPT], NOTHING, tl.int64)
    for j in range(0, blocks, N):
        block = j + tl.arange(0, N)
        seen = seen_by(order, doc, KIndex, KDocs, b, block, blocks, DOCS) & real[:, None]
        if VISIBLE:
            at = (b * v_b + head * v_h + token * v_t)[:, None] + (block * v_n)[None, :]
            seen = seen & (tl.load(Visible + at, mask=seen, other=0) != 0)
        if tl.max(seen.to(tl.int32)) > 0:  # most blocks are in the future of most queries
            s = products(q, Keys, b, kv_head, block, blocks, k_b, k_n, k_h, scale, D, DP, PRECISION)
            seen = seen & (s > float("-inf"))
            if FORCED:
                at = (b * f_b + head * f_h + token * f_t)[:, None] + (block * f_n)[None, :]
                s = tl.where(tl.load(Forced + at, mask=seen, other=0) != 0, float("inf"), s)
            new = tl.topk(tl.where(seen, packed(s, block[None, :]), NOTHING), KEPT)
            best = tl.topk(tl.reshape(tl.join(best, new), [M, 2 * KEPT]), KEPT)
    slot = tl.arange(0, KEPT)[None, :]
    taken = (best != NOTHING) & (slot < slots)
    ids = tl.sort(tl.where(taken, (best & LAST).to(tl.int32) ^ LAST, LAST))
    out = Out + (((b * HEADS + head) * T + token) * slots)[:, None] + slot
    tl.store(out, tl.where(ids == LAST, -1, ids), mask=real[:, None] & (slot < slots))


def _configs(kept: int) -> list[dict[str, int]]:
    if kept > 16:
        return [{"M": 16, "N": 64, "num_warps": 4, "num_stages": 1}]
    return [{"M": 64, "N": 32, "num_warps": 4, "num_stages": 1}, {"M": 64, "N": 64, "num_warps": 8, "num_stages": 1}]


def _launch(
    q: Tensor, keys: Tensor, k: int, q_index: Tensor, k_index: Tensor, q_doc_ids: Tensor | None,
    k_doc_ids: Tensor | None, scale: float, forced: Tensor | None, visible: Tensor | None,
) -> Tensor:  # fmt: skip
    (q, keys, *masks), constants = prepared(q, keys, q_index, k_index, q_doc_ids, k_doc_ids)
    (B, T, Hq, D), (N, Hkv) = q.shape, keys.shape[1:3]
    out = torch.empty(B, Hq, T, k, device=q.device, dtype=torch.int32)
    if k == 0:
        return out
    rules = [None if x is None else x.to(torch.uint8).expand(B, Hq, T, N) for x in (forced, visible)]
    steps = [n for x in rules for n in ((0,) * 4 if x is None else x.stride())]
    kept = max(2, triton.next_power_of_2(k))
    tuned = dict(gpu.options("select_blocks_forward", q, _configs(kept), D=D, kept=kept))
    tuned["M"] = min(tuned["M"], max(16, triton.next_power_of_2(T * Hq // Hkv)))
    tuned["N"] = min(tuned["N"], max(16, kept, triton.next_power_of_2(N)))
    grid = (triton.cdiv(T * Hq // Hkv, tuned["M"]), B * Hkv)
    with gpu.launching(q):
        select_blocks_forward[grid](
            q, keys, *masks, *rules, out, scale, T, N, k, *q.stride()[:3], *keys.stride()[:3], *steps, **constants,
            KEPT=kept, FORCED=forced is not None, VISIBLE=visible is not None, **tuned,
        )  # fmt: skip
    return out


select_blocks = torch.library.custom_op("zoo::select_blocks", _launch, mutates_args=())


@select_blocks.register_fake
def _(q, keys, k, *rest):
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], k, dtype=torch.int32)


@register_flop_formula(torch.ops.zoo.select_blocks)
def _(q, keys, *args, **kwargs) -> int:
    return flops(q[0], q[1], keys[1], q[2], q[3])


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls at tuned sizes, for compiling without a GPU."""
    q, keys = (torch.empty(1, n, h, 128, device="meta", dtype=torch.bfloat16) for n, h in ((4096, 16), (64, 4)))
    index = tuple(torch.empty(1, n, device="meta", dtype=torch.int64) for n in (4096, 64))
    forced = torch.empty(4096, 64, device="meta", dtype=torch.bool)
    for k in (3, 16, 64):
        yield f"top{k}", lambda k=k: _launch(q, keys, k, *index, None, None, 1.0, forced if k == 16 else None, None)
