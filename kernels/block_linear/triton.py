"""Block-diagonal products in Triton: a program per tile of rows, tile of outputs and block.

Monarch's transpositions are addresses: a product writes (its gradient reads) value f of a row of n values at place
(f % L) (n / L) + f // L. BLAST's sum over blocks is formed tile by tile where the second product loads its operand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels import gpu

PRODUCT = [
    {"BR": 64, "BM": 64, "BK": 32, "num_warps": 4, "num_stages": 3},
    {"BR": 128, "BM": 128, "BK": 32, "num_warps": 8, "num_stages": 3},
    {"BR": 16, "BM": 64, "BK": 64, "num_warps": 4, "num_stages": 3},
]
MIX_PRODUCT = [
    {"BR": 64, "BM": 128, "BK": 32, "num_warps": 4, "num_stages": 2},
    {"BR": 16, "BM": 128, "BK": 64, "num_warps": 4, "num_stages": 2},
]
WEIGHT = [
    {"BM": 64, "BK": 64, "BR": 32, "num_warps": 4, "num_stages": 3},
    {"BM": 128, "BK": 128, "BR": 32, "num_warps": 8, "num_stages": 3},
]
MIX = [{"BR": 32, "BK": 64, "num_warps": 4}]
SCALES = [{"BR": 32, "BK": 64, "num_warps": 4}]
_PART = 2048  # rows summed by one program of the scales' gradient


@triton.jit
def _place(f, total, L: tl.constexpr):
    if L == 1:
        return f
    else:
        return (f % L) * (total // L) + f // L


@triton.jit
def block_mm_forward(
    x, w, y, N, K, M, stride_b, stride_m, stride_k,
    READ: tl.constexpr, WRITE: tl.constexpr, PRECISION: tl.constexpr,
    BR: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One tile [BR, BM] of y_i = W_i x_i."""
    block, blocks = tl.program_id(2), tl.num_programs(2)
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    rows = x + row.to(tl.int64)[:, None] * blocks * K
    weight = w + block.to(tl.int64) * stride_b
    total = tl.zeros((BR, BM), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        at = _place(block * K + k, blocks * K, READ)
        a = tl.load(rows + at[None, :], mask=(row < N)[:, None] & (k < K)[None, :], other=0.0)
        b = tl.load(
            weight + k[:, None] * stride_k + m[None, :] * stride_m, mask=(k < K)[:, None] & (m < M)[None, :], other=0.0
        )
        total = tl.dot(a, b, total, input_precision=PRECISION)
    at = _place(block * M + m, blocks * M, WRITE)
    to = y + row.to(tl.int64)[:, None] * blocks * M + at[None, :]
    tl.store(to, total.to(y.dtype.element_ty), mask=(row < N)[:, None] & (m < M)[None, :])


@triton.jit
def _mixed(z, s, row, k, N, J, K, stride_j, BR: tl.constexpr, BK: tl.constexpr):
    """Σ_j s_j ⊙ z_j of some rows and ranks, in float32."""
    total = tl.zeros((BR, BK), tl.float32)
    mask = (row < N)[:, None] & (k < K)[None, :]
    rows = z + row.to(tl.int64)[:, None] * J * K + k[None, :]
    for j in range(0, J):
        scale = tl.load(s + j * stride_j + k, mask=k < K, other=0.0)
        total += tl.load(rows + j * K, mask=mask, other=0.0).to(tl.float32) * scale.to(tl.float32)[None, :]
    return total


@triton.jit
def block_mix_mm_forward(
    z, s, w, y, N, J, K, M, stride_i, stride_j, stride_b, stride_m, stride_k, PRECISION: tl.constexpr,
    BR: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One tile [BR, BM] of y_i = W_i Σ_j s_ij ⊙ z_j."""
    block, blocks = tl.program_id(2), tl.num_programs(2)
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    weight = w + block.to(tl.int64) * stride_b
    total = tl.zeros((BR, BM), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        a = _mixed(z, s + block.to(tl.int64) * stride_i, row, k, N, J, K, stride_j, BR, BK)
        b = tl.load(
            weight + k[:, None] * stride_k + m[None, :] * stride_m, mask=(k < K)[:, None] & (m < M)[None, :], other=0.0
        )
        total = tl.dot(a.to(w.dtype.element_ty), b, total, input_precision=PRECISION)
    to = y + row.to(tl.int64)[:, None] * blocks * M + (block * M + m)[None, :]
    tl.store(to, total.to(y.dtype.element_ty), mask=(row < N)[:, None] & (m < M)[None, :])


@triton.jit
def block_mix_forward(z, s, h, N, J, K, stride_i, stride_j, BR: tl.constexpr, BK: tl.constexpr):
    """One tile [BR, BK] of h_i = Σ_j s_ij ⊙ z_j."""
    block, blocks = tl.program_id(2), tl.num_programs(2)
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    total = _mixed(z, s + block.to(tl.int64) * stride_i, row, k, N, J, K, stride_j, BR, BK)
    to = h + row.to(tl.int64)[:, None] * blocks * K + (block * K + k)[None, :]
    tl.store(to, total.to(h.dtype.element_ty), mask=(row < N)[:, None] & (k < K)[None, :])


@triton.jit
def block_mm_weight_backward(
    x, grad, dw, N, K, M, READ: tl.constexpr, WRITE: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """One tile [BM, BK] of grad_i^T x_i."""
    block, blocks = tl.program_id(2), tl.num_programs(2)
    m, k = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BK + tl.arange(0, BK)
    at_m, at_k = _place(block * M + m, blocks * M, WRITE), _place(block * K + k, blocks * K, READ)
    total = tl.zeros((BM, BK), tl.float32)
    for start in range(0, N, BR):
        row = start + tl.arange(0, BR)
        line, here = row.to(tl.int64) * blocks, row < N
        a = tl.load(grad + line[None, :] * M + at_m[:, None], mask=here[None, :] & (m < M)[:, None], other=0.0)
        b = tl.load(x + line[:, None] * K + at_k[None, :], mask=here[:, None] & (k < K)[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    to = dw + block.to(tl.int64) * M * K + m[:, None] * K + k[None, :]
    tl.store(to, total.to(dw.dtype.element_ty), mask=(m < M)[:, None] & (k < K)[None, :])


@triton.jit
def block_mix_scales_backward(
    grad, z, ds, N, A, J, K, PART: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """grad_i ⊙ z_j summed over the rows of one part, for BK ranks of one pair (i, j)."""
    pair, part = tl.program_id(1), tl.program_id(2)
    i, j = pair // J, pair % J
    k = tl.program_id(0) * BK + tl.arange(0, BK)
    total = tl.zeros((BR, BK), tl.float32)
    for start in range(part * PART, tl.minimum((part + 1) * PART, N), BR):
        row = start + tl.arange(0, BR)
        mask = (row < N)[:, None] & (k < K)[None, :]
        line = row.to(tl.int64)[:, None] * K
        a = tl.load(grad + line * A + (i * K + k)[None, :], mask=mask, other=0.0).to(tl.float32)
        b = tl.load(z + line * J + (j * K + k)[None, :], mask=mask, other=0.0).to(tl.float32)
        total += a * b
    tl.store(ds + (part.to(tl.int64) * A * J + pair) * K + k, tl.sum(total, 0), mask=k < K)


def _precision(x: Tensor) -> str:
    return "ieee" if x.dtype == torch.float32 else "tf32"


def product(x: Tensor, weight: Tensor, read: int, write: int, scales: Tensor | None = None) -> Tensor:
    """y [N, b M] of x [N, b K] and weight [b, M, K] of any strides; with scales, of x mixed by them."""
    N, (blocks, M, K) = x.shape[0], weight.shape
    x, y = x.contiguous(), x.new_empty(N, blocks * M)
    if y.numel() == 0:
        return y
    name, configs = ("block_mm_forward", PRODUCT) if scales is None else ("block_mix_mm_forward", MIX_PRODUCT)
    config = gpu.options(name, x, configs, K=K, M=M)
    grid = (triton.cdiv(N, config["BR"]), triton.cdiv(M, config["BM"]), blocks)
    with gpu.launching(x):
        if scales is None:
            block_mm_forward[grid](
                x, weight, y, N, K, M, *weight.stride(), READ=read, WRITE=write, PRECISION=_precision(x), **config
            )
        else:
            scales = scales if scales.stride(2) == 1 else scales.contiguous()
            block_mix_mm_forward[grid](
                x, scales, weight, y, N, scales.shape[1], K, M, *scales.stride()[:2], *weight.stride(),
                PRECISION=_precision(x), **config,
            )  # fmt: skip
    return y


def weight_gradient(x: Tensor, grad: Tensor, blocks: int, read: int, write: int) -> Tensor:
    """[b, M, K]: grad_i^T x_i."""
    N, K, M = x.shape[0], x.shape[1] // blocks, grad.shape[1] // blocks
    x, grad, dw = x.contiguous(), grad.contiguous(), x.new_empty(blocks, M, K)
    config = gpu.options("block_mm_weight_backward", x, WEIGHT, K=K, M=M)
    with gpu.launching(x):
        block_mm_weight_backward[(triton.cdiv(M, config["BM"]), triton.cdiv(K, config["BK"]), blocks)](
            x, grad, dw, N, K, M, READ=read, WRITE=write, PRECISION=_precision(x), **config
        )
    return dw


def mix(z: Tensor, scales: Tensor) -> Tensor:
    """h [N, a r] of z [N, b r] and scales [a, b, r]."""
    N, (a, b, rank) = z.shape[0], scales.shape
    z, h = z.contiguous(), z.new_empty(N, a * rank)
    scales = scales if scales.stride(2) == 1 else scales.contiguous()
    if h.numel() == 0:
        return h
    config = gpu.options("block_mix_forward", z, MIX, K=rank)
    with gpu.launching(z):
        block_mix_forward[(triton.cdiv(N, config["BR"]), triton.cdiv(rank, config["BK"]), a)](
            z, scales, h, N, b, rank, *scales.stride()[:2], **config
        )
    return h


def scales_gradient(grad: Tensor, z: Tensor, rank: int) -> Tensor:
    """[a, b, r]: grad_i ⊙ z_j summed over rows, by parts of the rows so that few blocks still fill a GPU."""
    N, a, b = z.shape[0], grad.shape[1] // rank, z.shape[1] // rank
    grad, z, parts = grad.contiguous(), z.contiguous(), triton.cdiv(N, _PART)
    ds = torch.empty(parts, a, b, rank, dtype=torch.float32, device=z.device)
    if parts:
        config = gpu.options("block_mix_scales_backward", z, SCALES, K=rank)
        with gpu.launching(z):
            block_mix_scales_backward[(triton.cdiv(rank, config["BK"]), a * b, parts)](
                grad, z, ds, N, a, b, rank, PART=_PART, **config
            )
    return ds.sum(0).to(z.dtype)


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    """What tools/aot.py compiles: realistic calls on meta tensors."""
    x = torch.empty(8192, 4096, dtype=torch.bfloat16, device="meta")
    square, u, scales = x.new_empty(64, 64, 64), x.new_empty(16, 256, 1024), x.new_empty(16, 16, 1024)
    z = x.new_empty(8192, 16 * 1024)

    yield "block-diagonal", lambda: (product(x, x.new_empty(16, 256, 256), 1, 1), product(x, square.mT, 1, 1))
    yield "Monarch", lambda: (product(x, square, 1, 64), product(x, square.mT, 64, 1))
    yield "weights", lambda: (weight_gradient(x, x, 64, 1, 64), weight_gradient(z, x, 16, 1, 1))
    yield "BLAST", lambda: (product(z, u, 1, 1, scales), mix(z, scales.transpose(0, 1)), scales_gradient(z, z, 1024))
