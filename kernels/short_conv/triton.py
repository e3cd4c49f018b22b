"""The short convolution in Triton: tiles of tokens x channels, bias and SiLU fused. Backward is two passes: gradient
dz before the activation with partial sums of the weights' gradient for each tile of tokens (added up afterwards in one
order), then dx_t = sum_j w_j dz_{t+j}. The equations are in native.c; w_j is the tap j tokens back.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels import gpu
from zoo.kernels.short_conv import fused

FORWARD = [{"BT": 32, "BD": 128, "num_warps": 4}, {"BT": 64, "BD": 64, "num_warps": 4}]
BACKWARD = [{"BT": 32, "BD": 64, "num_warps": 4}]


@triton.jit
def tap(
    x, past, docs, row, t, d, T, D, j: tl.constexpr, W: tl.constexpr, PAST: tl.constexpr, DOCS: tl.constexpr
):  # fmt: skip
    """x_{t-j} [BT, BD] in float32, zero outside the document; the tokens before the first one are in `past`."""
    there = (t >= j) & (t < T)
    if DOCS:
        own = tl.load(docs + row * T + t, mask=t < T, other=0)
        there = there & (tl.load(docs + row * T + t - j, mask=there, other=0) == own)
    value = tl.load(
        x + (row * T + t - j)[:, None] * D + d[None, :], mask=there[:, None] & (d < D)[None, :], other=0.0
    ).to(tl.float32)
    if PAST and j > 0:
        early = (t < j) & (t < T)
        before = past + (row * (W - 1) + t + (W - 1 - j))[:, None] * D + d[None, :]
        value += tl.load(before, mask=early[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
    return value


@triton.jit
def before_activation(
    x, w, bias, past, docs, row, t, d, T, D, W: tl.constexpr, BIAS: tl.constexpr, PAST: tl.constexpr,
    DOCS: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """z [BT, BD]."""
    z = tl.zeros((BT, BD), tl.float32)
    if BIAS:
        z += tl.load(bias + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    for j in tl.static_range(W):
        weight = tl.load(w + d * W + (W - 1 - j), mask=d < D, other=0.0).to(tl.float32)
        z += weight[None, :] * tap(x, past, docs, row, t, d, T, D, j, W, PAST, DOCS)
    return z


@triton.jit
def short_conv_forward(
    x, w, bias, past, docs, y, T, D, W: tl.constexpr, SILU: tl.constexpr, BIAS: tl.constexpr, PAST: tl.constexpr,
    DOCS: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One tile of y."""
    row = tl.program_id(2).to(tl.int64)
    t, d = tl.program_id(1) * BT + tl.arange(0, BT), tl.program_id(0) * BD + tl.arange(0, BD)
    z = before_activation(x, w, bias, past, docs, row, t, d, T, D, W, BIAS, PAST, DOCS, BT, BD)
    if SILU:
        z = z * tl.sigmoid(z)
    inside = (t < T)[:, None] & (d < D)[None, :]
    tl.store(y + (row * T + t)[:, None] * D + d[None, :], z.to(y.dtype.element_ty), mask=inside)


@triton.jit
def short_conv_backward_z(
    dy, x, w, bias, past, docs, dz, dw, dbias, batch, T, D, W: tl.constexpr, SILU: tl.constexpr, BIAS: tl.constexpr,
    PAST: tl.constexpr, DOCS: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """dz of one tile and its part of dw [tiles, B, W, D] (tap by tap back) and dbias [tiles, B, D]."""
    tile, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    t, d = tile * BT + tl.arange(0, BT), tl.program_id(0) * BD + tl.arange(0, BD)
    inside = (t < T)[:, None] & (d < D)[None, :]
    at = (row * T + t)[:, None] * D + d[None, :]
    grad = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
    if SILU:
        z = before_activation(x, w, bias, past, docs, row, t, d, T, D, W, BIAS, PAST, DOCS, BT, BD)
        s = tl.sigmoid(z)
        grad = grad * s * (1 + z * (1 - s))
    tl.store(dz + at, grad, mask=inside)
    part = tile * batch + row
    tl.store(dbias + part * D + d, tl.sum(grad, 0), mask=d < D)
    for j in tl.static_range(W):
        value = tap(x, past, docs, row, t, d, T, D, j, W, PAST, DOCS)
        tl.store(dw + (part * W + j) * D + d, tl.sum(grad * value, 0), mask=d < D)


@triton.jit
def short_conv_backward_x(
    dz, w, docs, dx, dpast, T, D, W: tl.constexpr, PAST: tl.constexpr, DOCS: tl.constexpr, BT: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """dx of one tile; with a past, the tiles begin W - 1 tokens earlier and those rows go to dpast."""
    row = tl.program_id(2).to(tl.int64)
    t, d = tl.program_id(1) * BT + tl.arange(0, BT), tl.program_id(0) * BD + tl.arange(0, BD)
    if PAST:
        t -= W - 1
    grad = tl.zeros((BT, BD), tl.float32)
    if DOCS:
        own = tl.load(docs + row * T + t, mask=(t >= 0) & (t < T), other=0)
    for j in tl.static_range(W):
        there = (t + j >= 0) & (t + j < T) & (t < T)
        if DOCS:
            there = there & (tl.load(docs + row * T + t + j, mask=there, other=0) == own)
        weight = tl.load(w + d * W + (W - 1 - j), mask=d < D, other=0.0).to(tl.float32)
        later = dz + (row * T + t + j)[:, None] * D + d[None, :]
        grad += weight[None, :] * tl.load(later, mask=there[:, None] & (d < D)[None, :], other=0.0)
    here = (t >= 0) & (t < T)
    to = dx + (row * T + t)[:, None] * D + d[None, :]
    tl.store(to, grad.to(dx.dtype.element_ty), mask=here[:, None] & (d < D)[None, :])
    if PAST:
        to = dpast + (row * (W - 1) + t + W - 1)[:, None] * D + d[None, :]
        tl.store(to, grad.to(dpast.dtype.element_ty), mask=(t < 0)[:, None] & (d < D)[None, :])


def forward(x, weight, bias, past, doc_ids, silu) -> Tensor:
    """y; everything contiguous. Where there are documents the past belongs to none of them."""
    (B, T, D), W = x.shape, weight.shape[1]
    past = None if doc_ids is not None or W == 1 else past
    y = torch.empty_like(x)
    config = gpu.options("short_conv_forward", x, FORWARD)
    with gpu.launching(x):
        short_conv_forward[(triton.cdiv(D, config["BD"]), triton.cdiv(T, config["BT"]), B)](
            x, weight, _or(bias, x), _or(past, x), _or(doc_ids, x), y, T, D, W=W, SILU=silu, BIAS=bias is not None,
            PAST=past is not None, DOCS=doc_ids is not None, **config,
        )  # fmt: skip
    return y


def backward(dy, x, weight, bias, past, doc_ids, silu) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and past."""
    (B, T, D), W = x.shape, weight.shape[1]
    config = gpu.options("short_conv_backward_z", x, BACKWARD)
    read = None if doc_ids is not None or W == 1 else past
    tiles = triton.cdiv(T, config["BT"])
    dz = x.new_empty(B, T, D, dtype=torch.float32)
    dw, dbias = dz.new_empty(tiles, B, W, D), dz.new_empty(tiles, B, D)
    dx, dpast = torch.empty_like(x), x.new_empty(B, W - 1, D)
    if read is None:
        dpast.zero_()
    flags = {"W": W, "PAST": read is not None, "DOCS": doc_ids is not None}
    with gpu.launching(x):
        short_conv_backward_z[(triton.cdiv(D, config["BD"]), tiles, B)](
            dy, x, weight, _or(bias, x), _or(read, x), _or(doc_ids, x), dz, dw, dbias, B, T, D, SILU=silu,
            BIAS=bias is not None, **flags, **config,
        )  # fmt: skip
        rows = T + (W - 1 if read is not None else 0)
        short_conv_backward_x[(triton.cdiv(D, config["BD"]), triton.cdiv(rows, config["BT"]), B)](
            dz, weight, _or(doc_ids, x), dx, _or(dpast, x), T, D, **flags, **config
        )
    dweight = dw.sum((0, 1)).flip(0).t().to(weight.dtype).contiguous()
    return dx, dweight, dbias.sum((0, 1)).to(weight.dtype), dpast


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """A pointer that is not read stands for no tensor."""
    return other if tensor is None or tensor.numel() == 0 else tensor


def short_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, doc_ids: Tensor | None, activation: str | None
) -> tuple[Tensor, Tensor]:
    """See `zoo.kernels.short_conv.short_conv`. One token is the same kernel, W taps read for it."""
    return fused.short_conv(x, weight, bias, state, doc_ids, activation, "triton")


def launches() -> Iterator[tuple[str, callable]]:
    """What tools/aot.py compiles: realistic calls on meta tensors, forward and backward."""
    x = torch.empty(2, 4096, 2048, dtype=torch.bfloat16, device="meta")
    weight, past = x.new_empty(2048, 4), x.new_empty(2, 3, 2048)
    ids = x.new_empty(2, 4096, dtype=torch.int64)

    def plain():
        forward(x, weight, weight[:, 0], past, None, True)
        backward(x, x, weight, weight[:, 0], past, None, True)

    def documents():
        forward(x, weight, None, None, ids, True)
        backward(x, x, weight, None, None, ids, True)

    yield "bias, state and silu", plain
    yield "documents and silu", documents
    yield "step", lambda: forward(x[:, :1], weight, weight[:, 0], past, None, True)
