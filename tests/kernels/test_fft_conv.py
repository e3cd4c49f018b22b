"""fft_conv against conv1d, a state space scan and itself on single documents; rows against the definition elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from zoo.kernels.diagonal_scan import diagonal_scan
from zoo.kernels.fft_conv import fft_conv, transform_length

D = 6


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("T", "L"), [(1, 1), (1, 9), (40, 40), (40, 7), (33, 100)])
@pytest.mark.parametrize("backend", ["fft", "reference"])
def test_it_is_conv1d(T, L, backend):
    u, k, past = draw(2, T, D), draw(L, D, seed=1), draw(2, L - 1, D, seed=2)
    for state in (None, past):
        left = torch.zeros_like(past) if state is None else state
        padded = torch.cat([left, u], 1)
        want = F.conv1d(padded.mT, k.t().flip(1)[:, None], groups=D).mT
        y, last = fft_conv(u, k, state=state, backend=backend)
        torch.testing.assert_close(y, want, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(last, padded[:, T:], atol=0, rtol=0)


def test_with_a_decaying_filter_it_is_a_scan():
    """k_l = exp(-a l): the convolution mode of a diagonal state space model."""
    u, a = draw(2, 150, D), draw(D, seed=3).abs()
    k = (-a * torch.arange(150, dtype=u.dtype)[:, None]).exp()
    h, _ = diagonal_scan((-a).expand_as(u), u)
    torch.testing.assert_close(fft_conv(u, k)[0], h, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("lengths", [[1] * 20, [7, 1, 8, 16, 3], [64], [63, 1], [1, 63], [33, 31, 70]])
@pytest.mark.parametrize("L", [1, 5, 200])
def test_packed_documents_are_alone(lengths, L):
    k, ids = draw(L, D, seed=1), torch.arange(len(lengths)).flip(0).repeat_interleave(torch.tensor(lengths))
    results = []
    for packed in (True, False):
        u, taps = draw(2, len(ids), D).requires_grad_(), k.clone().requires_grad_()
        if packed:
            y = fft_conv(u, taps, doc_ids=ids.expand(2, -1))[0]
        else:
            y = torch.cat([fft_conv(part, taps, backend="reference")[0] for part in u.split(lengths, 1)], 1)
        results.append((y, *torch.autograd.grad(y.square().sum(), (u, taps))))
    torch.testing.assert_close(*results, atol=1e-10, rtol=1e-10)


def test_rows_may_have_different_documents():
    u, k, ids = draw(3, 40, D), draw(40, D, seed=1), (draw(3, 40, seed=5) > 1).long().cumsum(1)
    got, _ = fft_conv(u, k, doc_ids=ids)
    want, _ = fft_conv(u, k, doc_ids=ids, backend="reference")
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)


def test_precision_over_many_tokens():
    """fp32 transforms, also where u is bf16: the sum is rounded once, at the end."""
    u, k = draw(1, 4096, 4), draw(4096, 4, seed=1) / 64
    want, _ = fft_conv(u, k)
    got, _ = fft_conv(u.float(), k.float())
    assert (got - want).norm() / want.norm() < 2e-6
    coarse = u.bfloat16()
    got, want = fft_conv(coarse, k.float())[0], fft_conv(coarse.double(), k)[0]
    assert got.dtype == torch.bfloat16 and (got - want).abs().max() < 2**-8 * want.abs().max()


def test_transforms_are_barely_longer_than_asked():
    for n in range(1, 3000):
        length = transform_length(n)
        assert n <= length <= max(n + 1, 4 * n / 3) and any(length % f == 0 and _power(length // f) for f in (1, 3, 5))


def _power(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


def test_it_refuses_other_widths():
    with pytest.raises(ValueError, match="fft_conv"):
        fft_conv(draw(1, 5, D), draw(5, D + 1))
