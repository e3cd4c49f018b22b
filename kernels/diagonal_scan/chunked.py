"""Diagonal scan in two levels: a scan inside all T/C chunks at once, then the same function over the chunk ends,
then one broadcast. It only multiplies by decays of modulus <= 1: no division, no positive exponent.

Backward is the same scan from right to left, dh_t = dy_t + conj(a_{t+1}) dh_{t+1}, so that only a and h are
kept; it is made of differentiable operations, hence derivatives of any order exist.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_CHUNK = 16


def same_document(doc_ids: Tensor) -> Tensor:
    """[B, T] bool: does the token continue the document of the token before it (true for the first one)."""
    same = torch.ones_like(doc_ids, dtype=torch.bool)
    same[:, 1:] = doc_ids[:, 1:] == doc_ids[:, :-1]
    return same


def linear_scan(a: Tensor, b: Tensor, h: Tensor | None) -> Tensor:
    """h_t = a_t h_{t-1} + b_t from multipliers a [B, T, ...]; O(T) work, traceable, O(log T) operations."""
    B, T, *rest = b.shape
    chunk = min(T, _CHUNK)
    chunks = -(-T // chunk)
    pad = (0, 0) * len(rest) + (0, chunks * chunk - T)  # padded steps come after every real one
    a, b = (F.pad(x, pad).reshape(B, chunks, chunk, *rest) for x in (a, b))
    # a traced graph wants few operations, an eager run few passes over memory
    products, local = _doubling(a, b) if torch.compiler.is_compiling() else _steps(a, b)
    before = torch.zeros_like(b[:, :1, 0]) if h is None else h[:, None]
    if chunks > 1:
        before = torch.cat([before, linear_scan(products[:, :-1, -1], local[:, :-1, -1], h)], 1)
    return torch.addcmul(local, products, before[:, :, None]).reshape(B, chunks * chunk, *rest)[:, :T]


def _steps(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Running products of a and the scan from zero along dimension 2, one step after the other."""
    (first, *decays), (start, *rows) = a.unbind(2), b.unbind(2)
    products, local = [first], [start]
    for decay, x in zip(decays, rows):
        products.append(products[-1] * decay)
        local.append(torch.addcmul(x, decay, local[-1]))
    return torch.stack(products, 2), torch.stack(local, 2)


def _doubling(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The same by ceil(log2 C) passes, each of which doubles how far back a step has looked."""
    back = 1
    while back < a.shape[2]:
        b = torch.cat([b[:, :, :back], torch.addcmul(b[:, :, back:], a[:, :, back:], b[:, :, :-back])], 2)
        a = torch.cat([a[:, :, :back], a[:, :, back:] * a[:, :, :-back]], 2)
        back *= 2
    return a, b


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(a: Tensor, b: Tensor, h0: Tensor) -> Tensor:
        return linear_scan(a, b, h0)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        a, _, h0 = inputs
        ctx.save_for_backward(a, h0, output)

    @staticmethod
    def backward(ctx, grad: Tensor):
        a, h0, h = ctx.saved_tensors
        following = torch.cat([torch.zeros_like(a[:, :1]), a.flip(1)[:, :-1]], 1).conj()
        db = linear_scan(following, grad.flip(1), None).flip(1)
        before = torch.cat([h0[:, None], h[:, :-1]], 1)
        return db * before.conj(), db, db[:, 0] * a[:, 0].conj()


def multipliers(log_decay: Tensor, inputs: Tensor, doc_ids: Tensor | None) -> tuple[Tensor, torch.dtype]:
    """exp(log_decay) in the shape of inputs, 0 where a document begins, and the dtype of the computation."""
    wide = torch.promote_types(torch.promote_types(log_decay.dtype, inputs.dtype), torch.float32)
    decay = torch.exp(log_decay.to(wide)).expand_as(inputs)
    if doc_ids is not None:
        same = same_document(doc_ids)
        decay = torch.where(same.view(*same.shape, *[1] * (inputs.ndim - 2)), decay, 0)
    return decay, wide


def diagonal_scan(
    log_decay: Tensor, inputs: Tensor, initial_state: Tensor | None, doc_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `zoo.kernels.diagonal_scan.diagonal_scan`."""
    decay, wide = multipliers(log_decay, inputs, doc_ids)
    h0 = torch.zeros_like(inputs[:, 0], dtype=wide) if initial_state is None else initial_state.to(wide)
    h = _Scan.apply(decay, inputs.to(wide), h0)
    return h if wide.is_complex else h.to(inputs.dtype), h[:, -1]
