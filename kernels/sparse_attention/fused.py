"""Attention over a BlockList as one opaque operator with gradients, run by one of two engines.

An engine is a module `zoo.kernels.sparse_attention.<engine>` ("native" or "triton", imported on first use) with

    forward(q, k, v, idx, q_index, k_index, q_doc_ids, k_doc_ids, k_bias,
            q_tile, kv_block, stride, causal, window, scale) -> (o, lse)
    backward(grad_o, grad_lse, o, lse, <the arguments of forward>) -> (dq, dk, dv, dk_bias)

Tensors come as the op's public function describes them, in any layout: q [B, Tq, Hq, D], k and v [B, Tk, Hkv, .],
idx int32 [B, Hs, tiles, n], indices and ids [B, T], k_bias [B, Tk, 1 | Hkv]; ids and k_bias may be None, and so may
window and grad_lse. What is returned is new and contiguous: o [B, Tq, Hq, Dv] in q's dtype, lse [B, Tq, Hq] in fp32
(fp64 where q is), -inf where nothing is visible, and gradients like their tensors, dk_bias empty (shape [0]) without
a k_bias. Kept for backward: the inputs, o and lse.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.kernels import higher
from zoo.kernels.block_list import BlockList
from zoo.kernels.sparse_attention import chunked
from zoo.kernels.sparse_attention.cost import flops

_TENSORS = 9  # q, k, v, idx, q_index, k_index, q_doc_ids, k_doc_ids, k_bias


def _engine(name: str) -> ModuleType:
    return importlib.import_module(f"zoo.kernels.sparse_attention.{name}")


@torch.library.custom_op("zoo::sparse_attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, idx: Tensor, q_index: Tensor, k_index: Tensor, q_doc_ids: Tensor | None,
    k_doc_ids: Tensor | None, k_bias: Tensor | None, q_tile: int, kv_block: int, stride: int, causal: bool,
    window: int | None, scale: float, engine: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    masks = (q_index, k_index, q_doc_ids, k_doc_ids, k_bias)
    return _engine(engine).forward(q, k, v, idx, *masks, q_tile, kv_block, stride, causal, window, scale)


@_forward.register_fake
def _(q, k, v, *rest):
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=wide)


@torch.library.custom_op("zoo::sparse_attention_backward", mutates_args=())
def _backward(
    grad_o: Tensor, grad_lse: Tensor | None, o: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, idx: Tensor,
    q_index: Tensor, k_index: Tensor, q_doc_ids: Tensor | None, k_doc_ids: Tensor | None, k_bias: Tensor | None,
    q_tile: int, kv_block: int, stride: int, causal: bool, window: int | None, scale: float, engine: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    inputs = (q, k, v, idx, q_index, k_index, q_doc_ids, k_doc_ids, k_bias)
    options = (q_tile, kv_block, stride, causal, window, scale)
    return _engine(engine).backward(grad_o, grad_lse, o, lse, *inputs, *options)


@_backward.register_fake
def _(grad_o, grad_lse, o, lse, q, k, v, idx, q_index, k_index, q_doc_ids, k_doc_ids, k_bias, *options):
    bias = q.new_empty(0) if k_bias is None else k_bias.new_empty(k_bias.shape)
    return *(x.new_empty(x.shape) for x in (q, k, v)), bias


def _keep(ctx, inputs, output) -> None:
    ctx.options = inputs[_TENSORS:]
    ctx.save_for_backward(*output, *inputs[:_TENSORS])
    ctx.set_materialize_grads(False)


def _gradient(ctx, grad_o, grad_lse):
    o, lse, *inputs = ctx.saved_tensors
    if higher.wanted():
        q, k, v, idx, *masks, bias = inputs
        *sizes, causal, window, scale, _ = ctx.options

        def again(q, k, v, bias):
            return chunked.sparse_attention(q, k, v, BlockList(idx, *sizes), causal, window, scale, *masks, bias)

        *grads, bias = higher.gradients(again, (q, k, v, bias), (grad_o, grad_lse))
        return *grads, *[None] * 5, bias, *[None] * len(ctx.options)
    grad_o = torch.zeros_like(o) if grad_o is None else grad_o
    dq, dk, dv, dk_bias = _backward(grad_o, grad_lse, o, lse, *inputs, *ctx.options)
    return dq, dk, dv, *[None] * 5, None if inputs[-1] is None else dk_bias, *[None] * len(ctx.options)


_forward.register_autograd(_gradient, setup_context=_keep)


def _flops(q, k, v, idx, q_tile, kv_block, stride) -> int:
    return flops(q[0], q[1], k[1], q[2], k[2], q[3], v[3], idx[3], kv_block, idx[1], q_tile, stride)


@register_flop_formula(torch.ops.zoo.sparse_attention)
def _(q, k, v, idx, qi, ki, qd, kd, bias, q_tile, kv_block, stride, *args, **kwargs) -> int:
    return _flops(q, k, v, idx, q_tile, kv_block, stride)


@register_flop_formula(torch.ops.zoo.sparse_attention_backward)
def _(grad_o, grad_lse, o, lse, q, k, v, idx, qi, ki, qd, kd, bias, q_tile, kv_block, stride, *args, **kwargs) -> int:
    # scores again, and the gradients of p, v, q and k
    return _flops(q, k, v, idx, q_tile, kv_block, stride) * 5 // 2


def sparse_attention(
    engine: str, q: Tensor, k: Tensor, v: Tensor, blocks: BlockList, causal: bool, window: int | None, scale: float,
    q_index: Tensor, k_index: Tensor, q_doc_ids: Tensor | None, k_doc_ids: Tensor | None, k_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `zoo.kernels.sparse_attention.sparse_attention`; a row is this with its engine's name before."""
    masks = (q_index, k_index, q_doc_ids, k_doc_ids, k_bias)
    sizes = (blocks.q_tile, blocks.kv_block, blocks.stride)
    return _forward(q, k, v, blocks.idx, *masks, *sizes, causal, window, scale, engine)
