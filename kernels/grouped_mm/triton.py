"""Grouped matrix product in Triton. The rows of each group are cut into blocks; a program finds its group from the
running number of blocks, which lies on the device, so that nothing waits for the counts and a group without rows costs
no program any work. The weights' gradient has a program for each tile of each group, which walks over its rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels import gpu

FORWARD = [
    {"BR": 64, "BM": 64, "BK": 32, "num_warps": 4, "num_stages": 2},
    {"BR": 128, "BM": 128, "BK": 32, "num_warps": 8, "num_stages": 3},
    {"BR": 16, "BM": 128, "BK": 64, "num_warps": 4, "num_stages": 3},
]
WEIGHT = [
    {"BK": 64, "BM": 64, "BR": 32, "num_warps": 4, "num_stages": 3},
    {"BK": 128, "BM": 128, "BR": 32, "num_warps": 8, "num_stages": 3},
]


@triton.jit
def grouped_mm_forward(
    x, w, ends, block_ends, y, K, M, stride_e, stride_k, stride_m, E: tl.constexpr, EP: tl.constexpr,
    BR: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile [BR, BM] of y."""
    block = tl.program_id(1)
    number = tl.arange(0, EP)
    until = tl.load(block_ends + number, mask=number < E, other=2147483647)
    group = tl.sum((until <= block).to(tl.int32), 0)
    if group < E:
        before = tl.load(block_ends + tl.maximum(group - 1, 0), mask=group > 0, other=0)
        first = tl.load(ends + tl.maximum(group - 1, 0), mask=group > 0, other=0)
        row = first + (block - before) * BR + tl.arange(0, BR)
        here = row < tl.load(ends + group)
        m = tl.program_id(0) * BM + tl.arange(0, BM)
        weight = w + group.to(tl.int64) * stride_e
        total = tl.zeros((BR, BM), tl.float32)
        for start in range(0, K, BK):
            k = start + tl.arange(0, BK)
            a = tl.load(
                x + row.to(tl.int64)[:, None] * K + k[None, :], mask=here[:, None] & (k < K)[None, :], other=0.0
            )
            b = tl.load(
                weight + k[:, None] * stride_k + m[None, :] * stride_m, mask=(k < K)[:, None] & (m < M)[None, :],
                other=0.0,
            )  # fmt: skip
            total = tl.dot(a, b, total, input_precision=PRECISION)
        to = y + row.to(tl.int64)[:, None] * M + m[None, :]
        tl.store(to, total.to(y.dtype.element_ty), mask=here[:, None] & (m < M)[None, :])


@triton.jit
def grouped_mm_weight_backward(
    x, grad, ends, dw, K, M, BK: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr
):
    """One tile [BK, BM] of x_e^T grad_e."""
    group = tl.program_id(2)
    first = tl.load(ends + tl.maximum(group - 1, 0), mask=group > 0, other=0)
    end = tl.load(ends + group)
    k, m = tl.program_id(0) * BK + tl.arange(0, BK), tl.program_id(1) * BM + tl.arange(0, BM)
    total = tl.zeros((BK, BM), tl.float32)
    for start in range(first, end, BR):
        row = start + tl.arange(0, BR)
        a = tl.load(
            x + row.to(tl.int64)[None, :] * K + k[:, None], mask=(row < end)[None, :] & (k < K)[:, None], other=0.0
        )
        b = tl.load(
            grad + row.to(tl.int64)[:, None] * M + m[None, :], mask=(row < end)[:, None] & (m < M)[None, :], other=0.0
        )
        total = tl.dot(a, b, total, input_precision=PRECISION)
    to = dw + group.to(tl.int64) * K * M + k[:, None] * M + m[None, :]
    tl.store(to, total.to(dw.dtype.element_ty), mask=(k < K)[:, None] & (m < M)[None, :])


def _precision(x: Tensor) -> str:
    return "ieee" if x.dtype == torch.float32 else "tf32"


def forward(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """y [N, M]; weight [E, K, M] with any strides."""
    (N, K), (E, _, M) = x.shape, weight.shape
    x, y = x.contiguous(), x.new_empty(N, M)
    if y.numel() == 0:
        return y
    config = gpu.options("grouped_mm_forward", x, FORWARD, K=K, M=M)
    ends = counts.cumsum(0).int()
    block_ends = ((counts + config["BR"] - 1) // config["BR"]).cumsum(0).int()
    blocks = (N + min(E, N) * (config["BR"] - 1)) // config["BR"]  # as many as any counts can need
    with gpu.launching(x):
        grouped_mm_forward[(triton.cdiv(M, config["BM"]), blocks)](
            x, weight, ends, block_ends, y, K, M, *weight.stride(), E=E, EP=triton.next_power_of_2(E),
            PRECISION=_precision(x), **config,
        )  # fmt: skip
    return y


def weight_gradient(x: Tensor, grad: Tensor, counts: Tensor) -> Tensor:
    """[E, K, M]: x_e^T grad_e for the rows of each group."""
    K, M, E = x.shape[1], grad.shape[1], counts.shape[0]
    x, grad = x.contiguous(), grad.contiguous()
    config = gpu.options("grouped_mm_weight_backward", x, WEIGHT, K=K, M=M)
    dw = x.new_empty(E, K, M)
    with gpu.launching(x):
        grouped_mm_weight_backward[(triton.cdiv(K, config["BK"]), triton.cdiv(M, config["BM"]), E)](
            x, grad, counts.cumsum(0).int(), dw, K, M, PRECISION=_precision(x), **config
        )
    return dw


def launches() -> Iterator[tuple[str, callable]]:
    """What tools/aot.py compiles: realistic calls on meta tensors."""
    x = torch.empty(8192, 2048, dtype=torch.bfloat16, device="meta")
    weight, counts = x.new_empty(64, 2048, 1024), torch.empty(64, dtype=torch.int64, device="meta")
    grad = x.new_empty(8192, 1024)

    def all_three():
        forward(x, weight, counts)
        weight_gradient(x, grad, counts)

    yield "64 experts 2048x1024", all_three
    yield "transposed", lambda: forward(grad, weight.transpose(1, 2), counts)
