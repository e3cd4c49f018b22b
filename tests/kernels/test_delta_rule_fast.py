"""The Triton row of the delta rule where the small examples do not reach: few tokens without gradients, prefill, tiles
and configurations."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from torch.nn import functional as F

from zoo.kernels import dispatch, gpu
from zoo.kernels.compare import first_difference
from zoo.kernels.delta_rule import delta_rule, reference

pytestmark = pytest.mark.skipif(not gpu.interpreting(), reason="Triton runs on the GPU here")
KINDS = ("none", "head", "channel")


def draw(kind, T, B=1, G=1, H=2, Dk=24, Dv=40, seed=0):
    gen = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=gen)

    shape = {"none": None, "head": (B, T, H), "channel": (B, T, H, Dk)}[kind]
    g = None if shape is None else F.logsigmoid(normal(*shape))
    q, k = normal(B, T, G, Dk), F.normalize(normal(B, T, G, Dk), dim=-1)
    return q, k, normal(B, T, H, Dv), 2 * normal(B, T, H).sigmoid(), g, normal(B, H, Dk, Dv)


def packed(*lengths):
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]


def row():
    return next(r for r in dispatch.rows("delta_rule") if r.backend == "triton")


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", [(1,), (15,), (2, 1, 4), (30, 36)])
def test_without_gradients(kind, lengths):
    *given, S = draw(kind, sum(lengths), B=2, G=1, H=2)
    ids = packed(*lengths).expand(2, -1) if len(lengths) > 1 else None
    for state in (S, None):
        options = {"scale": 0.3, "initial_state": state, "doc_ids": ids}
        for got, want in zip(*(delta_rule(*given, **options, backend=b) for b in ("triton", "reference"))):
            torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_prefill_then_token_by_token(kind):
    *given, S = draw(kind, T=68, G=2)
    want, last = delta_rule(*given, initial_state=S, backend="reference")
    outputs = []
    for a, b in itertools.pairwise((0, 65, 66, 68)):
        part = [x if x is None else x[:, a:b] for x in given]
        o, S = delta_rule(*part, initial_state=S, backend="triton")
        outputs.append(o)
    torch.testing.assert_close(torch.cat(outputs, 1), want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(S, last, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["head", "channel"])
def test_wider_than_a_tile_and_borders_of_chunks(kind):
    q, k, v, beta, g, S = draw(kind, T=131, H=1, Dk=72, Dv=72)
    args = (q, k, v, beta, g, 0.3, S, packed(64, 60, 4, 1, 2), 64)
    assert first_difference(row().run, reference.delta_rule, args) is None


def test_keys_that_repeat():
    """The largest weights a triangular system can have: every token reads all earlier ones in full."""
    q, k, v, beta, _, S = draw("none", T=70)
    k = k[:, :1].expand_as(k)
    for beta_of_all in (1.0, 2.0):
        args = (q, k, v, torch.full_like(beta, beta_of_all), None, 0.3, S, None, 64)
        assert first_difference(row().run, reference.delta_rule, args) is None


def test_every_configuration(monkeypatch):
    q, k, v, beta, g, _ = draw("channel", T=40, H=1, Dk=16, Dv=16)
    args = (q, k, v, beta, g, 0.3, None, packed(30, 10), 64)
    gpu.seen.clear()
    check = functools.partial(first_difference, row().run, reference.delta_rule, args)
    assert check() is None
    kernels = {name: configs for name, configs in gpu.seen.items() if name.startswith("delta_rule")}
    assert len(kernels) == 9
    for configs in itertools.islice(itertools.zip_longest(*kernels.values()), 1, None):  # the second of each, ..
        for name, config in zip(kernels, configs):
            if config is not None:
                monkeypatch.setitem(gpu.forced, name, config)
        assert check() is None


def test_no_token_leaves_the_state():
    q, k, v, beta, g, S = draw("head", T=0)
    S.requires_grad_()
    o, final = delta_rule(q, k, v, beta, g, initial_state=S, backend="triton")
    assert o.shape == v.shape and torch.equal(final, S)
    final.sum().backward()
    assert torch.equal(S.grad, torch.ones_like(S))
    with torch.no_grad():
        assert torch.equal(delta_rule(q, k, v, beta, g, initial_state=S, backend="triton")[1], S)


def test_wide_keys_go_elsewhere():
    q, k, v, beta, g, _ = draw("head", T=2, Dk=136, Dv=4)
    assert "registers" in row().refuse(q, k, v, beta, g, 1.0, None, None, 64)
