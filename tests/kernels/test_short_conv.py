"""The short convolution against torch's conv1d, and its own laws."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from zoo.kernels.short_conv import short_conv

BACKENDS = ("reference", "chunked")


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("T", [1, 2, 3, 4, 17])
@pytest.mark.parametrize("W", [1, 2, 4])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_is_a_causal_depthwise_convolution(backend, T, W, activation):
    x, weight, bias = draw(2, T, 5), draw(5, W, seed=1), draw(5, seed=2)
    want = F.conv1d(F.pad(x.transpose(1, 2), (W - 1, 0)), weight[:, None], bias, groups=5).transpose(1, 2)
    want = want if activation is None else want / (1 + torch.exp(-want))
    y, state = short_conv(x, weight, bias, activation=activation, backend=backend)
    torch.testing.assert_close(y, want)
    assert state.shape == (2, W - 1, 5)
    torch.testing.assert_close(state, F.pad(x, (0, 0, W - 1, 0))[:, T:])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cuts", [[11], [1] * 11, [2, 1, 5, 3], [10, 1]])
def test_state_continues_a_sequence(backend, cuts):
    x, weight = draw(2, 11, 3), draw(3, 4, seed=1)
    want, last = short_conv(x, weight, backend=backend)
    state, pieces = None, []
    for part in x.split(cuts, 1):
        y, state = short_conv(part, weight, state=state, backend=backend)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), want)
    torch.testing.assert_close(state, last)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [[9], [1, 1, 1, 6], [2, 3, 4], [8, 1]])
def test_documents_are_alone(backend, lengths):
    x, weight, bias = draw(2, 9, 3).requires_grad_(), draw(3, 4, seed=1).requires_grad_(), draw(3, seed=2)
    ids = torch.repeat_interleave(torch.tensor([7, 3, 9, 1])[: len(lengths)], torch.tensor(lengths)).expand(2, 9)
    packed, _ = short_conv(x, weight, bias, doc_ids=ids, backend=backend)
    alone = torch.cat([short_conv(part, weight, bias, backend=backend)[0] for part in x.split(lengths, 1)], 1)
    torch.testing.assert_close(packed, alone)
    out = draw(2, 9, 3, seed=3)
    for got, want in zip(
        torch.autograd.grad((packed * out).sum(), (x, weight)), torch.autograd.grad((alone * out).sum(), (x, weight))
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("T", [1, 2, 3, 9])
def test_chunked_has_the_gradient_of_the_reference(T):
    inputs = draw(2, T, 3), draw(3, 4, seed=1), draw(3, seed=2), draw(2, 3, 3, seed=3)
    grads = []
    for backend in BACKENDS:
        leaves = [t.clone().requires_grad_() for t in inputs]
        y, state = short_conv(*leaves[:3], activation="silu", state=leaves[3], backend=backend)
        grads.append(torch.autograd.grad(y.square().sum() + state.square().sum(), leaves))
    torch.testing.assert_close(*grads)


def test_is_causal_and_keeps_rows_apart():
    x, weight = draw(2, 8, 3), draw(3, 4, seed=1)
    other = x.clone()
    other[0, 5:] += 1
    a, b = (short_conv(t, weight)[0] for t in (x, other))
    assert torch.equal(a[0, :5], b[0, :5]) and torch.equal(a[1], b[1]) and not torch.equal(a[0, 5:], b[0, 5:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_stays_half(backend):
    x, weight = draw(1, 6, 3, dtype=torch.bfloat16), draw(3, 4, seed=1, dtype=torch.bfloat16)
    y, state = short_conv(x, weight, state=draw(1, 3, 3, seed=2), backend=backend)
    assert y.dtype == state.dtype == torch.bfloat16
    exact, _ = short_conv(x.double(), weight.double(), state=draw(1, 3, 3, seed=2).bfloat16().double())
    torch.testing.assert_close(y.double(), exact, atol=5e-2, rtol=3e-2)
