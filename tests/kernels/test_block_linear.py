"""Structured linear maps against dense matrices written out from the papers' formulas, gradients, FLOPs, sizes."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from zoo.kernels.block_linear import blast, block_diagonal, cost, fused, monarch

BACKENDS = ("chunked", "reference")


def normal(*shapes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def dense_monarch(first, second):
    """W[σl+λ, κp+π] = Σ_ρ second[λ,σ,ρ] first[κ, ρl+λ-κq, π] over the ρ that lie in block κ."""
    (k, q, p), (blocks, s, r) = first.shape, second.shape
    out = first.new_zeros(s * blocks, k * p)
    for block in range(blocks):
        for sigma in range(s):
            for rho in range(r):
                kappa, row = divmod(rho * blocks + block, q)
                out[sigma * blocks + block, kappa * p : (kappa + 1) * p] += (
                    second[block, sigma, rho] * first[kappa, row]
                )
    return out


def dense_blast(u, s, v):
    rows = [torch.cat([u[i] @ s[i, j].diag() @ v[j].T for j in range(len(v))], 1) for i in range(len(u))]
    return torch.cat(rows)


CASES = {
    "diagonal": (block_diagonal, ((3, 5, 4),), lambda w: torch.block_diag(*w)),
    "one block": (block_diagonal, ((1, 7, 3),), lambda w: w[0]),
    "monarch": (monarch, ((4, 4, 4), (4, 4, 4)), dense_monarch),
    "monarch rectangular": (monarch, ((3, 10, 7), (5, 4, 6)), dense_monarch),
    "monarch uneven": (monarch, ((4, 9, 5), (6, 2, 6)), dense_monarch),
    "blast": (blast, ((4, 3, 5), (4, 4, 5), (4, 6, 5)), dense_blast),
    "blast rectangular": (blast, ((2, 7, 3), (2, 5, 3), (5, 4, 3)), dense_blast),
}


@pytest.mark.parametrize("backend", (*BACKENDS, "triton"))
@pytest.mark.parametrize("name", CASES)
def test_equals_its_dense_matrix(name, backend):
    op, shapes, dense = CASES[name]
    dtype = torch.float32 if backend == "triton" else torch.float64
    factors = normal(*shapes)
    matrix = dense(*(f.detach() for f in factors))
    x = torch.randn(2, 3, matrix.shape[1], dtype=torch.float64)
    got = op(x.to(dtype), *(f.to(dtype) for f in factors), backend=backend)
    tolerance = 1e-4 if backend == "triton" else 1e-12
    torch.testing.assert_close(got.double(), x @ matrix.T, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_gradients(name, backend):
    op, shapes, dense = CASES[name]
    factors = normal(*shapes)
    x = torch.randn(2, dense(*(f.detach() for f in factors)).shape[1], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *a: op(*a, backend=backend), (x, *factors))
    if backend == "chunked":
        assert torch.autograd.gradgradcheck(op, (x, *factors))


@pytest.mark.parametrize("name", ["monarch uneven", "blast rectangular"])
def test_gradients_of_gradients_in_triton(name):
    """Its gradients are the same kernels again; the interpreter takes float32 only, so compare with chunked."""
    op, shapes, dense = CASES[name]
    results = []
    for backend in ("triton", "chunked"):
        factors = normal(*shapes, dtype=torch.float32)
        width = dense(*(f.detach() for f in factors)).shape[1]
        leaves = [torch.linspace(-1, 1, 3 * width).view(3, width).requires_grad_(), *factors]
        first = torch.autograd.grad(op(*leaves, backend=backend).square().sum(), leaves, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
    for got, want in zip(*results):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


def test_special_cases():
    x, u, v, square = (a.detach() for a in normal((5, 12), (3, 4, 6), (3, 4, 6), (4, 3, 3)))
    low_rank = u.flatten(0, 1) @ v.flatten(0, 1).T
    torch.testing.assert_close(blast(x, u, torch.ones(3, 3, 6).double(), v), x @ low_rank.T)
    only_diagonal = torch.eye(3).double()[..., None].expand(3, 3, 6)
    torch.testing.assert_close(blast(x, u, only_diagonal, v), block_diagonal(x, u @ v.mT))
    eye = torch.eye(3).double().expand(4, 3, 3)
    assert sorted(monarch(x[:1], eye, eye)[0].tolist()) == sorted(x[0].tolist())
    # of full rank, Monarch is any matrix: the identity in its second factor leaves the permuted first
    torch.testing.assert_close(monarch(x, square, eye).sum(1), block_diagonal(x, square).sum(1))


FLOPS = {
    "diagonal": cost.block_diagonal_flops(6, 3, 5, 4),
    "monarch rectangular": cost.monarch_flops(6, 3, 10, 7, 5, 4, 6),
    "blast rectangular": cost.blast_flops(6, 2, 7, 5, 4, 3),
}


@pytest.mark.parametrize("backend", ["chunked", "triton"])
@pytest.mark.parametrize("name", FLOPS)
def test_flops_are_counted(name, backend):
    op, shapes, dense = CASES[name]
    factors = normal(*shapes, dtype=torch.float32)
    x = torch.randn(2, 3, dense(*(f.detach() for f in factors)).shape[1], requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        y = op(x, *factors, backend=backend)
    assert counter.get_total_flops() == FLOPS[name]
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    again = 2 * 6 * 2 * 5 * 3 if (name, backend) == ("blast rectangular", "triton") else 0  # the sum, not kept
    assert counter.get_total_flops() == 2 * FLOPS[name] + again


def test_custom_ops_keep_their_promises():
    x, w, z, s, u = normal((3, 8), (2, 6, 4), (3, 12), (5, 2, 6), (5, 3, 6), dtype=torch.float32)
    calls = [
        (fused.block_mm, (x, w, 1, 2)),
        (fused.block_mm_weight, (x, z, 2, 1, 2)),
        (fused.block_mix, (z, s)),
        (fused.block_mix_scales, (normal((3, 30), dtype=torch.float32)[0], z, 6)),
        (fused.block_mix_mm, (z, s, u)),
    ]
    for op, args in calls:
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))


@pytest.mark.parametrize("name", CASES)
def test_compiles_and_takes_no_rows(name):
    op, shapes, dense = CASES[name]
    factors = normal(*shapes)
    matrix = dense(*(f.detach() for f in factors))
    x = torch.randn(2, 3, matrix.shape[1], dtype=torch.float64)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, *factors), x @ matrix.T)
    assert op(x[:, :0], *factors).shape == (2, 0, matrix.shape[0])
    assert op(x[0, 0], *factors).shape == (matrix.shape[0],)


def test_autocast_mixes_dtypes_as_matmul_does():
    x, w = normal((3, 8), (2, 6, 4), dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = block_diagonal(x.bfloat16(), w)
        exact = block_diagonal(x.double(), w.double())
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and w.grad.dtype == torch.float32 and exact.dtype == torch.float64
    torch.testing.assert_close(y.double(), exact, rtol=0.05, atol=0.1)


def test_wrong_shapes_are_named():
    x = torch.zeros(2, 12)
    with pytest.raises(ValueError, match=r"weight \[b, m, k\]; got \[2, 12\], \[3, 5, 5\]"):
        block_diagonal(x, torch.zeros(3, 5, 5))
    with pytest.raises(ValueError, match="l r = k q"):
        monarch(x, torch.zeros(3, 5, 4), torch.zeros(3, 5, 4))
    with pytest.raises(ValueError, match="s \\[a, b, r\\]"):
        blast(x, torch.zeros(3, 4, 2), torch.zeros(3, 3, 1), torch.zeros(3, 4, 2))
