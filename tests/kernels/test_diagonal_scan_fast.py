"""Complex numbers in the fast rows of the diagonal scan: the shared examples are real."""

from __future__ import annotations

import pytest
import torch

from zoo.kernels.diagonal_scan import diagonal_scan


@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize("docs", [False, True])
@pytest.mark.parametrize("state", [False, True])
def test_complex(backend, docs, state):
    gen = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=gen, dtype=torch.complex64)

    x, angle = draw(2, 37, 5), torch.rand(2, 37, 5, generator=gen)
    g = torch.complex(-torch.rand(2, 37, 5, generator=gen), 6.28 * angle)
    h = draw(2, 5) if state else None
    ids = torch.repeat_interleave(torch.arange(3), torch.tensor([1, 16, 20])).expand(2, -1) if docs else None
    weight, results = draw(2, 37, 5), []
    for row, dtype in ((backend, torch.complex64), ("reference", torch.complex128)):
        leaves = [y.to(dtype).requires_grad_() for y in (g, x, h) if y is not None]
        out, last = diagonal_scan(*leaves[:2], initial_state=leaves[2] if state else None, doc_ids=ids, backend=row)
        loss = (out * weight).real.sum() + last.abs().square().sum()
        results.append((out, last, *torch.autograd.grad(loss, leaves)))
    for got, want in zip(*results):
        torch.testing.assert_close(got.to(want.dtype), want, rtol=1e-4, atol=1e-4)
