"""The diagonal scan against closed forms and its token loop."""

from __future__ import annotations

import pytest
import torch

from zoo.kernels.diagonal_scan import diagonal_scan

BACKENDS = ("reference", "chunked")
REAL, COMPLEX = torch.float64, torch.complex128


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def decays(*shape, dtype=REAL, strength=1.0):
    real = -strength * draw(*shape, seed=5).abs()
    return torch.complex(real, 3 * draw(*shape, seed=6)) if dtype.is_complex else real


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [REAL, COMPLEX])
def test_is_the_decayed_sum(backend, dtype):
    T = 41
    g, x, h0 = decays(2, T, 3, 2, dtype=dtype), draw(2, T, 3, 2), draw(2, 3, 2, seed=1)
    b = g.cumsum(1)
    pair = (b[:, :, None] - b[:, None]).masked_fill(~torch.ones(T, T, dtype=bool).tril()[..., None, None], -torch.inf)
    want = (pair.exp() * x[:, None]).sum(2) + b.exp() * h0[:, None]
    h, last = diagonal_scan(g, x, initial_state=h0, backend=backend)
    torch.testing.assert_close(h, want, atol=1e-11, rtol=1e-10)
    torch.testing.assert_close(last, want[:, -1], atol=1e-11, rtol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_decay_it_is_the_running_sum_and_with_infinite_decay_nothing(backend):
    x = draw(2, 300, 4)
    torch.testing.assert_close(diagonal_scan(torch.zeros(4, dtype=REAL), x, backend=backend)[0], x.cumsum(1))
    forget = torch.full((4,), -torch.inf, dtype=REAL)
    assert torch.equal(diagonal_scan(forget, x, backend=backend)[0], x)


@pytest.mark.parametrize("dtype", [REAL, COMPLEX])
@pytest.mark.parametrize("T", [1, 2, 15, 16, 17, 63, 257, 530])
@pytest.mark.parametrize("packed", [False, True])
def test_chunked_equals_the_loop(dtype, T, packed):
    inputs = decays(2, T, 3, dtype=dtype), draw(2, T, 3), draw(2, 3, seed=1)
    doc_ids = (torch.arange(T) // 7 + torch.tensor([[0], [3]])) if packed else None
    results = []
    for backend in BACKENDS:
        g, x, h0 = (t.clone().requires_grad_() for t in inputs)
        h, last = diagonal_scan(g, x, initial_state=h0, doc_ids=doc_ids, backend=backend)
        weight = draw(*h.shape, seed=2)
        loss = (h.real * weight + 2 * h.imag * weight if dtype.is_complex else h * weight).sum() + last.real.sum()
        results.append((h, last, *torch.autograd.grad(loss, (g, x, h0))))
    torch.testing.assert_close(*results, atol=1e-10, rtol=1e-10)


def test_derivatives_of_both_orders():
    for dtype in (REAL, COMPLEX):
        inputs = [t.requires_grad_() for t in (decays(1, 18, 1, dtype=dtype), draw(1, 18, 1), draw(1, 1, seed=1))]

        def scan(g, x, h0):
            return diagonal_scan(g, x, initial_state=h0)

        assert torch.autograd.gradcheck(scan, inputs)
        assert torch.autograd.gradgradcheck(scan, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cuts", [[1] * 40, [16, 24], [7, 1, 32], [39, 1]])
def test_state_continues_a_sequence(backend, cuts):
    g, x = decays(2, 40, 3), draw(2, 40, 3)
    want, end = diagonal_scan(g, x, backend=backend)
    state, pieces = None, []
    for g_part, x_part in zip(g.split(cuts, 1), x.split(cuts, 1)):
        h, state = diagonal_scan(g_part, x_part, initial_state=state, backend=backend)
        pieces.append(h)
    torch.testing.assert_close(torch.cat(pieces, 1), want, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(state, end, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("strength", [1e-3, 1.0, 30.0, 1e4])
def test_single_precision_at_any_decay(strength):
    g, x = decays(2, 700, 8, strength=strength), draw(2, 700, 8)
    exact, _ = diagonal_scan(g, x, backend="reference")
    leaf = g.float().requires_grad_()
    h, _ = diagonal_scan(leaf, x.float())
    assert (h - exact).norm() / exact.norm() < 1e-6
    h.sum().backward()
    assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_dtypes(backend):
    for dtype, state in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (REAL, REAL)):
        h, last = diagonal_scan(decays(1, 5, 2).to(dtype), draw(1, 5, 2).to(dtype), backend=backend)
        assert (h.dtype, last.dtype) == (dtype, state)
    g = decays(1, 5, 2, dtype=COMPLEX).to(torch.complex64)
    h, last = diagonal_scan(g, draw(1, 5, 2).bfloat16(), backend=backend)
    assert h.dtype == last.dtype == torch.complex64


def test_compiles_as_one_graph():
    def loss(g, x):
        return diagonal_scan(g, x)[0].square().sum()

    g, x = decays(2, 35, 3).requires_grad_(), draw(2, 35, 3)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(g, x), g), torch.autograd.grad(loss(g, x), g))
