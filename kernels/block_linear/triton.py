"""Block-structured linear maps in Triton.

One kernel multiplies by blocks. Feature f of its input or output may lie at (f % L) R + f / L, which is how the
transpositions of Monarch cost no pass of their own. Monarch whose blocks each give a part to each block behind
them (l divides q) runs as one kernel: y_lambda = sum_kappa left_lambda,kappa (right_kappa,lambda x_kappa), nothing
between the factors leaves the chip. BLAST runs as two: h_i = sum_j s_ij V_j x_j, all i of a tile of ranks at once,
then U_i h_i. Gradients are in triton_backward.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels import gpu

PRODUCT = [
    {"BN": 64, "BQ": 64, "BP": 32, "num_warps": 4, "num_stages": 3},
    {"BN": 128, "BQ": 128, "BP": 32, "num_warps": 8, "num_stages": 3},
    {"BN": 16, "BQ": 64, "BP": 64, "num_warps": 4, "num_stages": 3},
]
MONARCH = [
    {"BN": 64, "BP": 32, "num_warps": 4, "num_stages": 2},
    {"BN": 16, "BP": 64, "num_warps": 4, "num_stages": 2},
]
BLAST = [{"BN": 16, "BR": 32, "BP": 64, "num_warps": 4, "num_stages": 2}]
MIX = [{"BN": 16, "BR": 64, "num_warps": 4}]
WIDEST = 128  # outputs and ranks of a block that the fused Monarch holds
MOST_BLOCKS = 16  # that the fused BLAST holds


@triton.jit
def place(f, L: tl.constexpr, R: tl.constexpr):
    """Where feature f lies."""
    where = f
    if L > 1:
        where = (f % L) * R + f // L
    return where


@triton.jit
def block_product(
    x, w, y, N, Q, P, stride_x, stride_y, stride_k, stride_q, stride_p, XL: tl.constexpr, XR: tl.constexpr,
    YL: tl.constexpr, YR: tl.constexpr, BN: tl.constexpr, BQ: tl.constexpr, BP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile [BN, BQ] of y_k = x_k w_k^T."""
    block = tl.program_id(2)
    n, q = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1) * BQ + tl.arange(0, BQ)
    row = n.to(tl.int64)
    weight = w + block.to(tl.int64) * stride_k
    total = tl.zeros((BN, BQ), tl.float32)
    for start in range(0, P, BP):
        p = start + tl.arange(0, BP)
        a = tl.load(
            x + row[:, None] * stride_x + place(block * P + p, XL, XR)[None, :],
            mask=(n < N)[:, None] & (p < P)[None, :], other=0.0,
        )  # fmt: skip
        b = tl.load(
            weight + q[None, :] * stride_q + p[:, None] * stride_p, mask=(q < Q)[None, :] & (p < P)[:, None], other=0.0
        )
        total = tl.dot(a, b, total, input_precision=PRECISION)
    to = y + row[:, None] * stride_y + place(block * Q + q, YL, YR)[None, :]
    tl.store(to, total.to(y.dtype.element_ty), mask=(n < N)[:, None] & (q < Q)[None, :])


@triton.jit
def monarch_forward(
    x, right, left, y, N, P, S, K, L, G, BN: tl.constexpr, BG: tl.constexpr, BS: tl.constexpr, BP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Block lambda of y for BN rows. right: [K, G L, P], whose rows g L + lambda go to lambda; left: [L, S, K G]."""
    block = tl.program_id(1)
    n, g, s = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BG), tl.arange(0, BS)
    row = n.to(tl.int64)
    total = tl.zeros((BN, BS), tl.float32)
    for k in range(0, K):
        from_rows = right + (tl.cast(k, tl.int64) * G * L + g * L + block) * P
        z = tl.zeros((BN, BG), tl.float32)
        for start in range(0, P, BP):
            p = start + tl.arange(0, BP)
            a = tl.load(
                x + row[:, None] * (K * P) + (k * P + p)[None, :], mask=(n < N)[:, None] & (p < P)[None, :], other=0.0
            )
            b = tl.load(from_rows[None, :] + p[:, None], mask=(g < G)[None, :] & (p < P)[:, None], other=0.0)
            z = tl.dot(a, b, z, input_precision=PRECISION)
        behind = left + (tl.cast(block, tl.int64) * S + s)[None, :] * (K * G) + (k * G + g)[:, None]
        c = tl.load(behind, mask=(s < S)[None, :] & (g < G)[:, None], other=0.0)
        total = tl.dot(z.to(c.dtype), c, total, input_precision=PRECISION)
    to = y + row[:, None] * (S * L) + (s * L + block)[None, :]
    tl.store(to, total.to(y.dtype.element_ty), mask=(n < N)[:, None] & (s < S)[None, :])


@triton.jit
def blast_forward(
    x, right, mix, h, N, P, R, C, B, BN: tl.constexpr, BR: tl.constexpr, BB: tl.constexpr, BP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """h_i [N, B, R] = sum_j s_ij V_j x_j, for BN rows, BR ranks and all i."""
    n, r, i = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1) * BR + tl.arange(0, BR), tl.arange(0, BB)
    row = n.to(tl.int64)
    total = tl.zeros((BB, BN, BR), tl.float32)
    for j in range(0, C):
        z = tl.zeros((BN, BR), tl.float32)
        for start in range(0, P, BP):
            p = start + tl.arange(0, BP)
            a = tl.load(
                x + row[:, None] * (C * P) + (j * P + p)[None, :], mask=(n < N)[:, None] & (p < P)[None, :], other=0.0
            )
            b = tl.load(
                right + (tl.cast(j, tl.int64) * R + r)[None, :] * P + p[:, None],
                mask=(r < R)[None, :] & (p < P)[:, None], other=0.0,
            )  # fmt: skip
            z = tl.dot(a, b, z, input_precision=PRECISION)
        s = tl.load(mix + (i[:, None] * C + j) * R + r[None, :], mask=(i < B)[:, None] & (r < R)[None, :], other=0.0)
        total += s.to(tl.float32)[:, None, :] * z[None, :, :]
    to = h + (row[None, :, None] * B + i[:, None, None]) * R + r[None, None, :]
    there = (i < B)[:, None, None] & (n < N)[None, :, None] & (r < R)[None, None, :]
    tl.store(to, total.to(h.dtype.element_ty), mask=there)


@triton.jit
def block_mix(
    z, mix, h, N, R, C, B, stride_i, stride_j, BN: tl.constexpr, BR: tl.constexpr
):  # fmt: skip
    """h_i = sum_j s_ij z_j of [N, C, R] for BN rows and BR ranks; the tiles of z stay in the cache from i to i."""
    n, r = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1) * BR + tl.arange(0, BR)
    there = (n < N)[:, None] & (r < R)[None, :]
    row = n.to(tl.int64)
    for i in range(0, B):
        total = tl.zeros((BN, BR), tl.float32)
        for j in range(0, C):
            s = tl.load(mix + i * stride_i + j * stride_j + r, mask=r < R, other=0.0).to(tl.float32)
            part = tl.load(z + (row[:, None] * C + j) * R + r[None, :], mask=there, other=0.0).to(tl.float32)
            total += s[None, :] * part
        tl.store(h + (row[:, None] * B + i) * R + r[None, :], total.to(h.dtype.element_ty), mask=there)


def precision(x: Tensor) -> str:
    """Of products: no TF32 where the inputs are float32."""
    return "ieee" if x.dtype == torch.float32 else "tf32"


Places = tuple[int, int]
PLAIN = (1, 1)


def product(x: Tensor, weight: Tensor, x_places: Places = PLAIN, y_places: Places = PLAIN) -> Tensor:
    """y_k = x_k w_k^T; weight [k, q, p] with any strides; places (L, R) of the features of x and y."""
    (N, width), (blocks, Q, P) = x.shape, weight.shape
    y = x.new_empty(N, blocks * Q)
    if y.numel() == 0:
        return y
    config = gpu.options("block_product", x, PRODUCT, Q=Q, P=P)
    grid = (triton.cdiv(N, config["BN"]), triton.cdiv(Q, config["BQ"]), blocks)
    with gpu.launching(x):
        block_product[grid](
            x, weight, y, N, Q, P, width, blocks * Q, *weight.stride(), XL=x_places[0], XR=x_places[1],
            YL=y_places[0], YR=y_places[1], PRECISION=precision(x), **config,
        )  # fmt: skip
    return y


def mixed(z: Tensor, mix: Tensor) -> Tensor:
    """[N, b r] from [N, c r]; mix [b, c, r] with any strides of b and c."""
    N, (B, C, R) = z.shape[0], mix.shape
    h = z.new_empty(N, B * R)
    if h.numel() == 0:
        return h
    config = gpu.options("block_mix", z, MIX, R=R)
    with gpu.launching(z):
        block_mix[(triton.cdiv(N, config["BN"]), triton.cdiv(R, config["BR"]))](
            z, mix, h, N, R, C, B, mix.stride(0), mix.stride(1), **config
        )
    return h


def padded(n: int) -> int:
    """The size of a tile that holds n; a product takes no less than 16."""
    return max(16, triton.next_power_of_2(n))


def _monarch(x: Tensor, right: Tensor, left: Tensor) -> Tensor:
    N, (K, Q, P), (L, S, R) = x.shape[0], right.shape, left.shape
    if Q % L or max(Q // L, S) > WIDEST:
        z = product(x, right, y_places=(L, R))
        return product(z, left, y_places=(S, L))
    y = x.new_empty(N, S * L)
    if y.numel() == 0:
        return y
    G = Q // L
    config = gpu.options("monarch_forward", x, MONARCH, G=G, S=S, P=P)
    with gpu.launching(x):
        monarch_forward[(triton.cdiv(N, config["BN"]), L)](
            x, right, left, y, N, P, S, K, L, G, BG=padded(G), BS=padded(S), PRECISION=precision(x), **config
        )
    return y


def _blast(x: Tensor, right: Tensor, left: Tensor, mix: Tensor) -> Tensor:
    N, (B, C, R), P = x.shape[0], mix.shape, right.shape[2]
    if B > MOST_BLOCKS:
        return product(mixed(product(x, right), mix), left)
    h = x.new_empty(N, B * R)
    if h.numel():
        config = gpu.options("blast_forward", x, BLAST, B=B, R=R, P=P)
        with gpu.launching(x):
            blast_forward[(triton.cdiv(N, config["BN"]), triton.cdiv(R, config["BR"]))](
                x, right, mix, h, N, P, R, C, B, BB=triton.next_power_of_2(B), PRECISION=precision(x), **config
            )
    return product(h, left)


def forward(x: Tensor, right: Tensor, left: Tensor | None, mix: Tensor | None) -> Tensor:
    """y [N, features]; all contiguous and of one dtype."""
    if left is None:
        return product(x, right)
    return _monarch(x, right, left) if mix is None else _blast(x, right, left, mix)


def backward(dy: Tensor, x: Tensor, right: Tensor, left: Tensor | None, mix: Tensor | None) -> list[Tensor]:
    """Gradients of x, right, left and mix, those that are there."""
    from zoo.kernels.block_linear import triton_backward

    return triton_backward.backward(dy, x, right, left, mix)


def launches() -> Iterator[tuple[str, callable]]:
    """What tools/aot.py compiles: realistic calls on meta tensors."""
    x = torch.empty(4096, 2048, dtype=torch.bfloat16, device="meta")

    def both(*weights):
        backward(forward(x, *weights), x, *weights)

    yield "monarch 4x512", lambda: both(x.new_empty(4, 512, 512), x.new_empty(4, 512, 512), None)
    yield "monarch 32x64", lambda: forward(x, x.new_empty(32, 64, 64), x.new_empty(32, 64, 64), None)
    yield (
        "blast 16 rank 1024",
        lambda: both(x.new_empty(16, 1024, 128), x.new_empty(16, 128, 1024), x.new_empty(16, 16, 1024)),
    )
