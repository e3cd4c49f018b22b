"""pLSTM: every form against the token loop, and what the mathematics promises."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from zoo.kernels.plstm import flops, plstm

SLOTS = [(1, 1, 1), (2, 2, 2), (3, 2, 1), (1, 2, 2)]


def draw(slots, T=37, B=2, H=3, Dk=6, Dv=5, dtype=torch.float64, seed=0):
    J, V, R = slots
    gen = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(B, *shape, generator=gen, dtype=torch.float64).to(dtype)

    q, k, v = normal(T, H, Dk), normal(T, H, Dk), normal(T, H, V, Dv)
    S, M, D = normal(T, H, J, V), normal(T, H, R, J), normal(T, H, R, V)
    A = torch.linalg.qr(normal(T, H, J, J).double())[0].to(dtype) * normal(T, H, J, 1).tanh()
    return q, k, v, S, A, M, D, normal(H, J, Dk, Dv)


def packed(B, lengths):
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).expand(B, -1)


@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("T", [1, 2, 8, 9, 37, 70])
@pytest.mark.parametrize("docs", [False, True])
def test_it_is_the_loop_forward_and_backward(slots, T, docs):
    inputs = [x.requires_grad_() for x in draw(slots, T)]
    *given, C = inputs
    cut = max(T // 3, 1)
    ids = packed(2, [n for n in (cut, 1, T - cut - 1) if n > 0] if T > 1 else [1]) if docs else None
    results = []
    for backend, chunk in (("reference", 16), ("chunked", 8), ("chunked", 6), ("auto", 16)):
        o, final = plstm(*given, scale=0.7, initial_state=C, doc_ids=ids, chunk_size=chunk, backend=backend)
        weight = torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view_as(o)
        loss = (o * weight).sum() + (final * final.detach().cos()).sum()
        results.append((o, final, *torch.autograd.grad(loss, inputs)))
    for other in results[1:]:
        for want, got in zip(results[0], other):
            torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("cuts", [(1,), (8, 9), (5, 6, 30)])
def test_any_cut_gives_the_same(slots, cuts):
    *given, C = draw(slots)
    want, final = plstm(*given, initial_state=C, chunk_size=8)
    got = []
    for a, b in itertools.pairwise((0, *cuts, 37)):
        o, C = plstm(*(x[:, a:b] for x in given), initial_state=C, chunk_size=8)
        got.append(o)
    torch.testing.assert_close(torch.cat(got, 1), want, atol=1e-11, rtol=1e-11)
    torch.testing.assert_close(C, final, atol=1e-11, rtol=1e-11)


def test_it_is_its_operator():
    """Strictly lower M_i T_{i-1} .. T_{j+1} S_j (q_i . k_j), and D_i (q_i . k_i) on the diagonal."""
    q, k, v, S, A, M, D, _ = draw((3, 2, 2), T=10)
    want = torch.zeros(2, 10, 3, 2, 5, dtype=q.dtype)
    for i in range(10):
        want[:, i] += D[:, i] @ v[:, i] * (q[:, i] * k[:, i]).sum(-1)[..., None, None]
        reach = M[:, i]
        for j in reversed(range(i)):
            want[:, i] += reach @ S[:, j] @ v[:, j] * (q[:, i] * k[:, j]).sum(-1)[..., None, None]
            reach = reach @ A[:, j]
    torch.testing.assert_close(plstm(q, k, v, S, A, M, D, chunk_size=4)[0], want, atol=1e-11, rtol=1e-11)


def test_permutations_are_tracked():
    """With permutations for transitions the slots hold the running product of a symmetric group, S_3."""
    T, gen = 50, torch.Generator().manual_seed(0)
    swaps = torch.eye(3)[torch.stack([torch.randperm(3, generator=gen) for _ in range(T)])][None, :, None]
    ones = torch.ones(1, T, 1, 1)
    zero = torch.zeros(1, T, 1, 3, 1)
    start = torch.arange(3.0).view(1, 1, 3, 1, 1)
    o, C = plstm(
        ones, ones, ones[..., None], zero, swaps, torch.eye(3).expand(1, T, 1, 3, 3), zero, initial_state=start
    )
    want, seen = torch.arange(3.0), []
    for t in range(T):
        seen.append(want)
        want = swaps[0, t, 0] @ want
    torch.testing.assert_close(o[0, :, 0, :, 0], torch.stack(seen), atol=0, rtol=0)
    torch.testing.assert_close(C.flatten(), want, atol=0, rtol=0)


def test_bfloat16_keeps_a_float32_state():
    for slots in SLOTS[:2]:
        given = draw(slots, dtype=torch.bfloat16)
        o, C = plstm(*given[:-1])
        want, _ = plstm(*given[:-1], backend="reference")
        assert o.dtype == torch.bfloat16 and C.dtype == torch.float32
        torch.testing.assert_close(o, want, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("T", [1, 2, 16, 21, 40])
@pytest.mark.parametrize("state", [False, True])
def test_flops_are_those_executed(slots, T, state):
    *given, C = draw(slots, T)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        plstm(*given, initial_state=C if state else None)
    J, V, R = slots
    assert counter.get_total_flops() == flops(2, T, 3, 6, 5, slots=J, values=V, outputs=R, initial_state=state)


def test_wrong_shapes_are_refused():
    q, k, v, S, A, M, D, _ = draw((2, 2, 2))
    with pytest.raises(ValueError, match="plstm: source must be"):
        plstm(q, k, v, S[..., :1], A, M, D)
