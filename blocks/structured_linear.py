"""Linear maps of structured matrices A [out, in], with or without a dense guide beside them.

low_rank: A = lr2 lr1. block_dense: A = lr diag(blkdiag). block_shuffle, monarch: A = P2 diag(blkdiag2) P1
diag(blkdiag1) with the transpositions of `zoo.kernels.block_linear.monarch`; they differ in the inner width and in
the initial draw. blast: block (i, j) of A is u_i diag(s_ij) v_j^T. Parameters are named as in the released code of
"Building on Efficient Foundations" (arXiv:2406.16450) and Monarch (arXiv:2204.00595); BLAST's as in arXiv:2410.21262.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zoo.kernels.block_linear import blast, block_diagonal, monarch
from zoo.kernels.block_linear.cost import blast_flops, block_diagonal_flops, monarch_flops
from zoo.kernels.linear import Linear, linear


def orthogonal_(weight: Tensor) -> None:
    """Orthonormal columns (rows, where there are fewer) in every matrix of weight [..., m, k].

    The polar factor of a normal draw is uniform among such matrices, and so is this one, which costs less.
    """
    m, k = weight.shape[-2:]
    tall = torch.randn(*weight.shape[:-2], max(m, k), min(m, k), device=weight.device)
    q, r = torch.linalg.qr(tall)
    q = q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    weight.copy_(q if m >= k else q.mT)


class StructuredLinear(nn.Module):
    """y = A x, or with a guide y = g W x + (1 - g) A x, W being `weight` [out, in] and g given at each call.

    x: [..., in] -> y: [..., out]. W starts as A, so that at first g changes nothing.
    """

    weight: Tensor | None

    def __init__(self, in_features: int, out_features: int, guided: bool, kernel: str, device, dtype):
        super().__init__()
        self.in_features, self.out_features, self.kernel = in_features, out_features, kernel
        weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype)) if guided else None
        self.register_parameter("weight", weight)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, guided={self.weight is not None}"

    def apply_factors(self, x: Tensor) -> Tensor:
        """A x."""
        raise NotImplementedError

    def draw_factors(self) -> None:
        raise NotImplementedError

    def factor_flops(self, tokens: int) -> int:
        raise NotImplementedError

    def inner_width(self) -> int:
        """Elements a token leaves between the factors."""
        raise NotImplementedError

    def forward(self, x: Tensor, guide: Tensor | None = None) -> Tensor:
        y = self.apply_factors(x)
        if guide is None or self.weight is None:
            return y
        g = guide.to(y.dtype)
        return g * linear(x, self.weight) + (1 - g) * y

    @torch.no_grad()
    def matrix(self, guide: Tensor | None = None) -> Tensor:
        """A [out, in], multiplied out; with a guide, the mixture."""
        like = next(self.parameters())
        return self(torch.eye(self.in_features, device=like.device, dtype=like.dtype), guide).t()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.draw_factors()
        if self.weight is not None:
            self.weight.copy_(self.matrix())

    def flops(self, tokens: int) -> int:
        guide = 0 if self.weight is None else 2 * tokens * self.weight.numel()
        return guide + self.factor_flops(tokens)


class LowRank(StructuredLinear):
    """lr1: rank rows, lr2: rank columns; drawn as the best approximation of a dense draw, shared evenly by both."""

    def __init__(self, in_features, out_features, *, rank, blocks, guided, kernel, device, dtype):
        super().__init__(in_features, out_features, guided, kernel, device, dtype)
        self.lr1 = Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.lr2 = Linear(rank, out_features, bias=False, device=device, dtype=dtype)

    def draw_factors(self) -> None:
        rank = self.lr1.out_features
        dense = torch.randn(self.out_features, self.in_features, device=self.lr1.weight.device)
        u, s, vh = torch.linalg.svd(dense * self.in_features**-0.5, full_matrices=False)
        root = s[:rank].sqrt()
        self.lr1.weight.copy_(root[:, None] * vh[:rank])
        self.lr2.weight.copy_(u[:, :rank] * root)

    def apply_factors(self, x: Tensor) -> Tensor:
        return self.lr2(self.lr1(x))

    def factor_flops(self, tokens: int) -> int:
        return 2 * tokens * self.inner_width() * (self.in_features + self.out_features)

    def inner_width(self) -> int:
        return self.lr1.out_features


class BlockDense(StructuredLinear):
    """blkdiag: [b, rank / b, in / b], lr: [out, rank]."""

    def __init__(self, in_features, out_features, *, rank, blocks, guided, kernel, device, dtype):
        super().__init__(in_features, out_features, guided, kernel, device, dtype)
        shape = (blocks, rank // blocks, in_features // blocks)
        self.blkdiag = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.lr = Linear(rank, out_features, bias=False, device=device, dtype=dtype)

    def draw_factors(self) -> None:
        orthogonal_(self.blkdiag)
        orthogonal_(self.lr.weight)

    def apply_factors(self, x: Tensor) -> Tensor:
        return self.lr(block_diagonal(x, self.blkdiag, backend=self.kernel))

    def factor_flops(self, tokens: int) -> int:
        return block_diagonal_flops(tokens, *self.blkdiag.shape) + 2 * tokens * self.lr.weight.numel()

    def inner_width(self) -> int:
        return self.lr.in_features


class BlockShuffle(StructuredLinear):
    """blkdiag1: [b, q, in / b], blkdiag2: [b, out / b, q] with q = min(in, out) / b; both drawn orthogonal."""

    def __init__(self, in_features, out_features, *, rank, blocks, guided, kernel, device, dtype):
        super().__init__(in_features, out_features, guided, kernel, device, dtype)
        width = rank * blocks if rank else min(in_features, out_features) // blocks
        factory = {"device": device, "dtype": dtype}
        self.blkdiag1 = nn.Parameter(torch.empty(blocks, width, in_features // blocks, **factory))
        self.blkdiag2 = nn.Parameter(torch.empty(blocks, out_features // blocks, width, **factory))

    def draw_factors(self) -> None:
        orthogonal_(self.blkdiag1)
        orthogonal_(self.blkdiag2)

    def apply_factors(self, x: Tensor) -> Tensor:
        return monarch(x, self.blkdiag1, self.blkdiag2, backend=self.kernel)

    def factor_flops(self, tokens: int) -> int:
        return monarch_flops(tokens, *self.blkdiag1.shape, *self.blkdiag2.shape)

    def inner_width(self) -> int:
        return self.blkdiag1.shape[0] * self.blkdiag1.shape[1]


class Monarch(BlockShuffle):
    """As BlockShuffle, or with `rank` q = rank b: each of the b x b blocks of A has that rank. Drawn as torch draws
    linear layers, block by block."""

    def draw_factors(self) -> None:
        for weight in (self.blkdiag1, self.blkdiag2):
            bound = weight.shape[-1] ** -0.5
            nn.init.uniform_(weight, -bound, bound)


class Blast(StructuredLinear):
    """u: [b, out / b, rank], s: [b, b, rank], v: [b, in / b, rank]; drawn so that entries of A have variance 1 / in."""

    def __init__(self, in_features, out_features, *, rank, blocks, guided, kernel, device, dtype):
        super().__init__(in_features, out_features, guided, kernel, device, dtype)
        factory = {"device": device, "dtype": dtype}
        self.u = nn.Parameter(torch.empty(blocks, out_features // blocks, rank, **factory))
        self.s = nn.Parameter(torch.empty(blocks, blocks, rank, **factory))
        self.v = nn.Parameter(torch.empty(blocks, in_features // blocks, rank, **factory))

    def draw_factors(self) -> None:
        nn.init.normal_(self.u, std=self.u.shape[-1] ** -0.5)
        nn.init.normal_(self.s)
        nn.init.normal_(self.v, std=self.in_features**-0.5)

    def apply_factors(self, x: Tensor) -> Tensor:
        return blast(x, self.u, self.s, self.v, backend=self.kernel)

    def factor_flops(self, tokens: int) -> int:
        (a, p, rank), (b, q, _) = self.u.shape, self.v.shape
        return blast_flops(tokens, a, p, b, q, rank)

    def inner_width(self) -> int:
        return 2 * self.s.shape[0] * self.s.shape[2]


STRUCTURES: dict[str, type[StructuredLinear]] = {
    "low_rank": LowRank,
    "block_dense": BlockDense,
    "block_shuffle": BlockShuffle,
    "monarch": Monarch,
    "blast": Blast,
}
