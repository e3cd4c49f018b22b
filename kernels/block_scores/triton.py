"""Block scores on a GPU: products of the inputs as they are, accumulated in fp32 and masked where they are made."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.kernels import gpu
from zoo.kernels.block_scores.chunked import visible_blocks
from zoo.kernels.block_scores.cost import flops
from zoo.kernels.precision import no_autocast


@triton.jit
def queries_of(
    Q, QIndex, QDocs, b, kv_head, first, T, q_b, q_t, q_h,
    SHARED: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr, DOCS: tl.constexpr,
):  # fmt: skip
    """Of M rows (token, head) under one key head: q, order index, document, token, head, and which are real."""
    row = first + tl.arange(0, M)
    token = (row // SHARED).to(tl.int64)
    head = kv_head * SHARED + row % SHARED
    real = token < T
    dims = tl.arange(0, DP)
    mask = real[:, None] & (dims[None, :] < D)
    q = tl.load(Q + (b * q_b + token * q_t + head * q_h)[:, None] + dims[None, :], mask=mask, other=0.0)
    order = tl.load(QIndex + b * T + token, mask=real, other=-1)
    doc = order
    if DOCS:
        doc = tl.load(QDocs + b * T + token, mask=real, other=-1)
    return q, order, doc, token, head, real


@triton.jit
def seen_by(q_order, q_doc, KIndex, KDocs, b, block, blocks, DOCS: tl.constexpr):
    """Which of some blocks end before each query, in its document."""
    last = tl.load(KIndex + b * blocks + block, mask=block < blocks, other=-1)
    seen = (last[None, :] >= 0) & (last[None, :] < q_order[:, None])
    if DOCS:
        doc = tl.load(KDocs + b * blocks + block, mask=block < blocks, other=0)
        seen = seen & (doc[None, :] == q_doc[:, None])
    return seen


@triton.jit
def products(
    q, Keys, b, kv_head, block, blocks, k_b, k_n, k_h, scale,
    D: tl.constexpr, DP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """scale * q . keys of some blocks."""
    dims = tl.arange(0, DP)
    mask = (block[None, :] < blocks) & (dims[:, None] < D)
    keys = tl.load(
        Keys + (b * k_b + block.to(tl.int64) * k_n + kv_head * k_h)[None, :] + dims[:, None], mask, other=0.0
    )
    return tl.dot(q, keys, input_precision=PRECISION) * scale


@triton.jit(do_not_specialize=["scale"])
def block_scores_forward(
    Q, Keys, QIndex, KIndex, QDocs, KDocs, Out, scale, T, blocks, q_b, q_t, q_h, k_b, k_n, k_h,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, DOCS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """M rows against N blocks."""
    b = (tl.program_id(2) // KV_HEADS).to(tl.int64)
    kv_head = tl.program_id(2) % KV_HEADS
    q, order, doc, token, head, real = queries_of(
        Q, QIndex, QDocs, b, kv_head, tl.program_id(0) * M, T, q_b, q_t, q_h, HEADS // KV_HEADS, D, DP, M, DOCS
    )
    block = tl.program_id(1) * N + tl.arange(0, N)
    s = products(q, Keys, b, kv_head, block, blocks, k_b, k_n, k_h, scale, D, DP, PRECISION)
    s = tl.where(seen_by(order, doc, KIndex, KDocs, b, block, blocks, DOCS), s, float("-inf"))
    at = ((b * HEADS + head) * T + token) * blocks
    tl.store(Out + at[:, None] + block[None, :], s, mask=real[:, None] & (block[None, :] < blocks))


CONFIGS = [
    {"M": 64, "N": 64, "num_warps": 4, "num_stages": 1},
    {"M": 128, "N": 64, "num_warps": 8, "num_stages": 1},
]


def prepared(q: Tensor, keys: Tensor, *of_tokens: Tensor | None) -> tuple[tuple, dict]:
    """Tensors as the kernels read them, and the constants that q and keys give."""
    common = torch.promote_types(q.dtype, keys.dtype)
    q, keys = (x if x.stride(-1) == 1 else x.contiguous() for x in (q.to(common), keys.to(common)))
    constants = {
        "HEADS": q.shape[2], "KV_HEADS": keys.shape[2], "D": q.shape[3],
        "DP": max(16, triton.next_power_of_2(q.shape[3])),
        "DOCS": of_tokens[2] is not None, "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
    }  # fmt: skip
    return (q, keys, *(None if x is None else x.contiguous() for x in of_tokens)), constants


def _launch(
    q: Tensor, keys: Tensor, q_index: Tensor, k_index: Tensor, q_doc_ids: Tensor | None, k_doc_ids: Tensor | None,
    scale: float,
) -> Tensor:  # fmt: skip
    (q, keys, *masks), constants = prepared(q, keys, q_index, k_index, q_doc_ids, k_doc_ids)
    (B, T, Hq, D), (N, Hkv) = q.shape, keys.shape[1:3]
    out = torch.empty(B, Hq, T, N, device=q.device, dtype=torch.float32)
    tuned = gpu.options("block_scores_forward", q, CONFIGS, D=D)
    grid = (triton.cdiv(T * Hq // Hkv, tuned["M"]), triton.cdiv(N, tuned["N"]), B * Hkv)
    with gpu.launching(q):
        block_scores_forward[grid](
            q, keys, *masks, out, scale, T, N, *q.stride()[:3], *keys.stride()[:3], **constants, **tuned
        )
    return out


_forward = torch.library.custom_op("zoo::block_scores", _launch, mutates_args=())


@_forward.register_fake
def _(q, keys, *rest):
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], keys.shape[1], dtype=torch.float32)


@register_flop_formula(torch.ops.zoo.block_scores)
def _(q, keys, *args, **kwargs) -> int:
    return flops(q[0], q[1], keys[1], q[2], q[3])


def _keep(ctx, inputs, output) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx, grad):
    q, keys, q_index, k_index, q_doc_ids, k_doc_ids = ctx.saved_tensors
    B, T, Hq, D = q.shape
    N, Hkv = keys.shape[1:3]
    visible = visible_blocks(q_index, k_index, q_doc_ids, k_doc_ids)
    grad = torch.where(visible[:, None], grad, 0).reshape(B, Hkv, -1, N) * ctx.scale
    with no_autocast(q.device):
        dq = (grad @ keys.float().transpose(1, 2)).reshape(B, Hq, T, D).transpose(1, 2)
        rows = q.float().transpose(1, 2).reshape(B, Hkv, -1, D)
        dkeys = (grad.mT @ rows).transpose(1, 2)
    return dq.to(q.dtype), dkeys.to(keys.dtype), None, None, None, None, None


_forward.register_autograd(_gradient, setup_context=_keep)


def block_scores(
    q: Tensor, keys: Tensor, q_index: Tensor, k_index: Tensor, q_doc_ids: Tensor | None, k_doc_ids: Tensor | None,
    scale: float,
) -> Tensor:  # fmt: skip
    """See `zoo.kernels.block_scores.block_scores`."""
    return _forward(q, keys, q_index, k_index, q_doc_ids, k_doc_ids, scale)


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls at tuned sizes, for compiling without a GPU."""
    for D in (64, 128):
        q, keys = (torch.empty(1, n, h, D, device="meta", dtype=torch.bfloat16) for n, h in ((4096, 16), (64, 4)))
        index = (torch.empty(1, n, device="meta", dtype=torch.int64) for n in (4096, 64))
        args = (q, keys, *index, None, None, 1.0)
        yield f"d{D}", lambda args=args: _launch(*args)
