"""Diagonal plus low-rank recurrence: every form against a loop of explicit matrices, and its special cases."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from zoo.kernels import native
from zoo.kernels.delta_rule import delta_rule
from zoo.kernels.dplr import dplr, flops
from zoo.kernels.linear_attention import linear_attention

needs_core = pytest.mark.skipif(native.missing("dplr") is not None, reason="needs a C compiler")
NAMES = "q k v a b log_decay state"


def draw(T=37, B=2, H=3, Dk=6, Dv=5, strength=1.0, seed=0):
    gen = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    q, k, v = normal(B, T, H, Dk), F.normalize(normal(B, T, H, Dk), dim=-1), normal(B, T, H, Dv)
    kappa = F.normalize(normal(B, T, H, Dk), dim=-1)
    g = strength * F.logsigmoid(normal(B, T, H, Dk))
    return q, k, v, -kappa, 2 * normal(B, T, H, Dk).sigmoid() * kappa, g, normal(B, H, Dk, Dv)


def packed(B, lengths):
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).expand(B, -1)


def matrices(q, k, v, a, b, g, S):
    """S_t = M_t S_{t-1} + k_t v_t^T, each M_t written out, one head and row at a time."""
    B, T, H, _ = q.shape
    o, final = torch.zeros_like(v), S.clone()
    for n, h, t in itertools.product(range(B), range(H), range(T)):
        M = torch.diag(g[n, t, h].exp()) + torch.outer(b[n, t, h], a[n, t, h])
        final[n, h] = M @ final[n, h] + torch.outer(k[n, t, h], v[n, t, h])
        o[n, t, h] = final[n, h].T @ q[n, t, h]
    return o, final


@pytest.mark.parametrize("backend", ["auto", "chunked", "reference"])
def test_is_a_product_of_matrices(backend):
    *given, S = draw(T=21)
    for got, want in zip(dplr(*given, initial_state=S, chunk_size=8, backend=backend), matrices(*given, S)):
        torch.testing.assert_close(got, want, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("T", [1, 2, 4, 16, 17, 37, 64])
@pytest.mark.parametrize("docs", [False, True])
def test_chunks_are_the_loop_forward_and_backward(T, docs):
    inputs = [x.requires_grad_() for x in draw(T)]
    *given, S = inputs
    cut = max(T // 3, 1)
    ids = packed(2, [n for n in (cut, 1, T - cut - 1) if n > 0] if T > 1 else [1]) if docs else None
    results = []
    for backend, chunk in (("reference", 64), ("chunked", 16), ("chunked", 8), ("auto", 64)):
        o, final = dplr(*given, scale=0.7, initial_state=S, doc_ids=ids, chunk_size=chunk, backend=backend)
        weight = torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view_as(o)
        loss = (o * weight).sum() + (final * final.detach().cos()).sum()
        results.append((o, final, *torch.autograd.grad(loss, inputs)))
    for other in results[1:]:
        for name, want, got in zip(("o", "final", *NAMES.split()), results[0], other):
            torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("backend", ["chunked", "auto"])
def test_gradcheck(backend):
    *given, S = (x.requires_grad_() for x in draw(T=9, B=1, H=2, Dk=3, Dv=2))

    def run(q, k, v, a, b, g, S):
        return dplr(q, k, v, a, b, g, initial_state=S, chunk_size=4, backend=backend)

    assert torch.autograd.gradcheck(run, (*given, S))


@pytest.mark.parametrize("cuts", [(1,), (16, 17, 19), (5, 6, 30)])
def test_any_cut_gives_the_same(cuts):
    *given, S = draw()
    want, final = dplr(*given, initial_state=S, chunk_size=8)
    got = []
    for start, end in itertools.pairwise((0, *cuts, 37)):
        o, S = dplr(*(x[:, start:end] for x in given), initial_state=S, chunk_size=8)
        got.append(o)
    torch.testing.assert_close(torch.cat(got, 1), want, atol=1e-11, rtol=1e-11)
    torch.testing.assert_close(S, final, atol=1e-11, rtol=1e-11)


def test_documents_are_separate_sequences():
    *given, _ = draw()
    got, _ = dplr(*given, doc_ids=packed(2, [5, 1, 31]), chunk_size=8)
    parts = [dplr(*(x[:, s:e] for x in given), chunk_size=8)[0] for s, e in ((0, 5), (5, 6), (6, 37))]
    torch.testing.assert_close(got, torch.cat(parts, 1), atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("backend", ["chunked", "auto"])
def test_the_delta_rule_is_a_case(backend):
    q, k, v, _, _, g, S = draw()
    beta = 2 * torch.rand(*v.shape[:3], 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    want = delta_rule(q, k, v, beta[..., 0], g, scale=0.3, initial_state=S)
    got = dplr(q, beta * k, v, k * g.exp(), -beta * k, g, scale=0.3, initial_state=S, backend=backend)
    for x, y in zip(got, want):
        torch.testing.assert_close(x, y, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("silent", ["a", "b"])
def test_without_either_factor_it_is_linear_attention(silent):
    q, k, v, a, b, g, S = draw()
    a, b = (torch.zeros_like(x) if name == silent else x for name, x in (("a", a), ("b", b)))
    want = linear_attention(q, k, v, g, initial_state=S)
    for x, y in zip(dplr(q, k, v, a, b, g, initial_state=S), want):
        torch.testing.assert_close(x, y, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("backend", ["chunked", "auto"])
@pytest.mark.parametrize("strength", [0.01, 1.0, 20.0, 200.0])
def test_strong_decay_is_finite_and_exact(strength, backend):
    double = draw(T=150, strength=strength)[:6]
    want, _ = dplr(*double, backend="reference")
    single = [x.float().requires_grad_() for x in double]
    got, _ = dplr(*single, backend=backend)
    assert (got - want).norm() / want.norm() < 1e-5
    got.square().sum().backward()
    assert all(x.grad.isfinite().all() for x in single)


@pytest.mark.parametrize("backend", ["chunked", "auto"])
@pytest.mark.parametrize("T", [1, 4, 16, 21, 40])
def test_flops_are_those_executed(T, backend):
    *given, S = draw(T)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        dplr(*given, initial_state=S, chunk_size=16, backend=backend)
    assert counter.get_total_flops() == flops(2, T, 3, 6, 5, chunk_size=16)


def test_wrong_shapes_are_refused():
    q, k, v, a, b, g, _ = draw()
    with pytest.raises(ValueError, match="log_decay must be"):
        dplr(q, k, v, a, b, g[..., 0])
    with pytest.raises(ValueError, match="v \\[B, T, H, Dv\\]"):
        dplr(q, k, v[:, :5], a, b, g)


@needs_core
def test_operator_keeps_its_promises():
    *given, S = (x.contiguous() for x in draw(T=21))
    leaves = [x.requires_grad_() for x in given]
    torch.library.opcheck(torch.ops.zoo.dplr.default, (*leaves, None, packed(2, [9, 12]), 0.5, 16, 32, True, "native"))
    one = [x.detach()[:, :1].contiguous() for x in given]
    torch.library.opcheck(torch.ops.zoo.dplr_step.default, (*one, S, 0.5, "native"))


@needs_core
def test_gradients_of_gradients():
    results = []
    for backend in ("native", "reference"):
        *given, S = (x.requires_grad_() for x in draw(T=9, Dk=3, Dv=2))
        o, final = dplr(*given, initial_state=S, backend=backend)
        first = torch.autograd.grad(o.square().sum() + final.square().sum(), (*given, S), create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in first), (*given, S)))
    for got, want in zip(*results):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)
