"""Gradients of the block-structured linear maps in Triton. The gradients of inputs are products by transposed views;
those of weights walk over the rows, cut into parts that are added up afterwards in one order where there are few tiles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels import gpu
from zoo.kernels.block_linear.triton import PLAIN, Places, mixed, place, precision, product

WEIGHT = [
    {"BQ": 64, "BP": 64, "BN": 32, "num_warps": 4, "num_stages": 3},
    {"BQ": 128, "BP": 64, "BN": 32, "num_warps": 8, "num_stages": 3},
]
MIX = [{"BI": 16, "BJ": 16, "BR": 16, "num_warps": 4}]
PROGRAMS = 512  # as many as keep a large GPU busy
FEWEST = 256  # rows of a part


@triton.jit
def block_weight_backward(
    dy, x, dw, N, Q, P, stride_y, stride_x, blocks, rows, YL: tl.constexpr, YR: tl.constexpr, XL: tl.constexpr,
    XR: tl.constexpr, BQ: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile [BQ, BP] of dw_k = dy_k^T x_k over one part of the rows."""
    block, part = tl.program_id(2) % blocks, tl.program_id(2) // blocks
    q, p = tl.program_id(0) * BQ + tl.arange(0, BQ), tl.program_id(1) * BP + tl.arange(0, BP)
    end = tl.minimum((part + 1) * rows, N)
    at_y, at_x = place(block * Q + q, YL, YR), place(block * P + p, XL, XR)
    total = tl.zeros((BQ, BP), tl.float32)
    for start in range(part * rows, end, BN):
        n = start + tl.arange(0, BN)
        row = n.to(tl.int64)
        a = tl.load(dy + row[None, :] * stride_y + at_y[:, None], mask=(n < end)[None, :] & (q < Q)[:, None], other=0.0)
        b = tl.load(x + row[:, None] * stride_x + at_x[None, :], mask=(n < end)[:, None] & (p < P)[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    to = dw + tl.program_id(2).to(tl.int64) * Q * P + q[:, None] * P + p[None, :]
    tl.store(to, total.to(dw.dtype.element_ty), mask=(q < Q)[:, None] & (p < P)[None, :])


@triton.jit
def block_mix_backward(
    dh, z, dmix, N, R, C, B, rows, tiles, BI: tl.constexpr, BJ: tl.constexpr, BR: tl.constexpr
):  # fmt: skip
    """ds_ij = sum over one part of the rows of dh_i z_j, for BI x BJ blocks and BR ranks; a row is read once."""
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    i = tl.program_id(1) // tiles * BI + tl.arange(0, BI)
    j = tl.program_id(1) % tiles * BJ + tl.arange(0, BJ)
    part = tl.program_id(2)
    on_i, on_j = (i < B)[:, None] & (r < R)[None, :], (j < C)[:, None] & (r < R)[None, :]
    total = tl.zeros((BI, BJ, BR), tl.float32)
    for n in range(part * rows, tl.minimum((part + 1) * rows, N)):
        row = tl.cast(n, tl.int64)
        a = tl.load(dh + (row * B + i)[:, None] * R + r[None, :], mask=on_i, other=0.0).to(tl.float32)
        b = tl.load(z + (row * C + j)[:, None] * R + r[None, :], mask=on_j, other=0.0).to(tl.float32)
        total += a[:, None, :] * b[None, :, :]
    to = dmix + ((tl.cast(part, tl.int64) * B + i[:, None, None]) * C + j[None, :, None]) * R + r[None, None, :]
    there = (i < B)[:, None, None] & (j < C)[None, :, None] & (r < R)[None, None, :]
    tl.store(to, total, mask=there)


def _parts(rows: int, programs: int) -> int:
    return max(1, min(PROGRAMS // programs, rows // FEWEST))


def weight_gradient(
    dy: Tensor, x: Tensor, shape: torch.Size, y_places: Places = PLAIN, x_places: Places = PLAIN
) -> Tensor:
    """[k, q, p]: dy_k^T x_k."""
    N, (blocks, Q, P) = x.shape[0], shape
    config = gpu.options("block_weight_backward", x, WEIGHT, Q=Q, P=P)
    tiles = triton.cdiv(Q, config["BQ"]), triton.cdiv(P, config["BP"])
    parts = _parts(N, tiles[0] * tiles[1] * blocks)
    dw = x.new_empty(parts, blocks, Q, P, dtype=x.dtype if parts == 1 else torch.float32)
    with gpu.launching(x):
        block_weight_backward[(*tiles, blocks * parts)](
            dy, x, dw, N, Q, P, dy.shape[1], x.shape[1], blocks, triton.cdiv(N, parts), YL=y_places[0],
            YR=y_places[1], XL=x_places[0], XR=x_places[1], PRECISION=precision(x), **config,
        )  # fmt: skip
    return dw[0] if parts == 1 else dw.sum(0).to(x.dtype)


def mix_gradient(dh: Tensor, z: Tensor, mix: Tensor) -> Tensor:
    """[b, c, r]: sum over rows of dh_i z_j."""
    N, (B, C, R) = z.shape[0], mix.shape
    config = gpu.options("block_mix_backward", z, MIX, R=R)
    tiles = triton.cdiv(C, config["BJ"])
    programs = triton.cdiv(R, config["BR"]), triton.cdiv(B, config["BI"]) * tiles
    parts = _parts(N, programs[0] * programs[1])
    dmix = z.new_empty(parts, B, C, R, dtype=torch.float32)
    with gpu.launching(z):
        block_mix_backward[(*programs, parts)](dh, z, dmix, N, R, C, B, triton.cdiv(N, parts), tiles, **config)
    return dmix.sum(0).to(mix.dtype)


def backward(dy: Tensor, x: Tensor, right: Tensor, left: Tensor | None, mix: Tensor | None) -> list[Tensor]:
    """Gradients of x, right, left and mix, those that are there."""
    if left is None:
        return [product(dy, right.transpose(1, 2)), weight_gradient(dy, x, right.shape)]
    if mix is None:
        L, S, R = left.shape
        between, behind = (L, R), (S, L)  # how the features lie between the factors and behind the second
        z = product(x, right, y_places=between)
        dz, dleft = product(dy, left.transpose(1, 2), x_places=behind), weight_gradient(dy, z, left.shape, behind)
        dx = product(dz, right.transpose(1, 2), x_places=between)
        return [dx, weight_gradient(dz, x, right.shape, between), dleft]
    z = product(x, right)
    dh, dleft = product(dy, left.transpose(1, 2)), weight_gradient(dy, mixed(z, mix), left.shape)
    dz, dmix = mixed(dh, mix.transpose(0, 1)), mix_gradient(dh, z, mix)
    return [product(dz, right.transpose(1, 2)), weight_gradient(dz, x, right.shape), dleft, dmix]
