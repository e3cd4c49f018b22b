"""Linear attention: the chunked form against the token loop, and what the mathematics promises."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from zoo.kernels import use
from zoo.kernels.linear_attention import flops, linear_attention

KINDS = ("none", "constant", "head", "channel")


def draw(kind, T=37, B=2, H=4, G=2, Dk=6, Dv=5, strength=1.0, dtype=torch.float64, seed=0):
    gen = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=gen, dtype=torch.float64).to(dtype)

    shape = {"none": None, "constant": (H,), "head": (B, T, H), "channel": (B, T, H, Dk)}[kind]
    g = None if shape is None else strength * torch.nn.functional.logsigmoid(normal(*shape))
    return normal(B, T, G, Dk), normal(B, T, G, Dk), normal(B, T, H, Dv), g, normal(B, H, Dk, Dv)


def packed(B, T, lengths):
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    assert len(ids) == T
    return ids.expand(B, T)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T", [1, 2, 15, 16, 17, 37, 64])
@pytest.mark.parametrize("docs", [False, True])
def test_chunked_is_the_loop_forward_and_backward(kind, T, docs):
    inputs = [x if x is None else x.requires_grad_() for x in draw(kind, T)]
    *qkvg, S = inputs
    cut = max(T // 3, 1)
    lengths = [n for n in (cut, 1, T - cut - 1) if n > 0] if T > 1 else [1]
    ids = packed(2, T, lengths) if docs else None
    results = []
    for backend, chunk in (("reference", 64), ("chunked", 16), ("chunked", 8)):
        o, final = linear_attention(*qkvg, scale=0.7, initial_state=S, doc_ids=ids, chunk_size=chunk, backend=backend)
        weight = torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view_as(o)
        loss = (o * weight).sum() + (final * final.detach().cos()).sum()
        grads = torch.autograd.grad(loss, [x for x in inputs if x is not None])
        results.append((o, final, *grads))
    for other in results[1:]:
        for want, got in zip(results[0], other):
            torch.testing.assert_close(got, want, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    q, k, v, g, S = (x if x is None else x.requires_grad_() for x in draw(kind, T=9, B=1, H=2, G=1, Dk=3, Dv=2))
    given = [x for x in (q, k, v, g, S) if x is not None]

    def run(*args):
        g_ = args[3] if g is not None else None
        return linear_attention(*args[:3], g_, initial_state=args[-1], chunk_size=4)

    assert torch.autograd.gradcheck(run, given)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cuts", [(1,), (16, 17), (5, 6, 30)])
def test_any_cut_gives_the_same(kind, cuts):
    q, k, v, g, S = draw(kind)
    want, final = linear_attention(q, k, v, g, initial_state=S, chunk_size=8)
    got, edges = [], (0, *cuts, q.shape[1])
    for a, b in itertools.pairwise(edges):
        part = g if g is None or g.ndim == 1 else g[:, a:b]
        o, S = linear_attention(q[:, a:b], k[:, a:b], v[:, a:b], part, initial_state=S, chunk_size=8)
        got.append(o)
    torch.testing.assert_close(torch.cat(got, 1), want, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(S, final, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents_are_alone(kind):
    q, k, v, g, _ = draw(kind, T=40)
    lengths = [3, 1, 20, 16]
    o, final = linear_attention(q, k, v, g, doc_ids=packed(2, 40, lengths), chunk_size=8)
    start = 0
    for n in lengths:
        one = slice(start, start + n)
        part = g if g is None or g.ndim == 1 else g[:, one]
        want, last = linear_attention(q[:, one], k[:, one], v[:, one], part, backend="reference")
        torch.testing.assert_close(o[:, one], want, atol=1e-12, rtol=1e-12)
        start += n
    torch.testing.assert_close(final, last, atol=1e-12, rtol=1e-12)


def test_equal_channel_decays_are_a_head_decay():
    q, k, v, g, _ = draw("head")
    want, _ = linear_attention(q, k, v, g)
    got, _ = linear_attention(q, k, v, g[..., None].expand(*g.shape, q.shape[-1]))
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)


def test_no_decay_is_causal_attention_without_softmax():
    q, k, v, _, _ = draw("none", G=4)
    scores = torch.einsum("bihd,bjhd->bhij", q, k).tril()
    got, _ = linear_attention(q, k, v, chunk_size=8)
    torch.testing.assert_close(got, torch.einsum("bhij,bjhd->bihd", scores, v), atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("kind", ["head", "channel"])
@pytest.mark.parametrize("strength", [1.0, 20.0, 200.0])
def test_strong_decay_is_finite_and_exact(kind, strength):
    double = draw(kind, T=150, strength=strength)
    want, _ = linear_attention(*double[:4], backend="reference")
    single = [x.float().requires_grad_() for x in double[:4]]
    got, _ = linear_attention(*single)
    error = (got - want).norm() / want.norm()
    assert error < 5e-6
    got.square().sum().backward()
    assert all(x.grad.isfinite().all() for x in single)


def test_bfloat16_keeps_a_float32_state():
    q, k, v, g, _ = draw("head", dtype=torch.bfloat16)
    o, S = linear_attention(q, k, v, g)
    assert o.dtype == torch.bfloat16 and S.dtype == torch.float32
    with use(linear_attention="reference"):
        want, _ = linear_attention(q, k, v, g)
    torch.testing.assert_close(o, want, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T", [1, 2, 16, 21, 40])
def test_flops_are_those_executed(kind, T):
    q, k, v, g, S = draw(kind, T)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        linear_attention(q, k, v, g, initial_state=S, chunk_size=16)
    decay = "head" if kind == "constant" else kind
    assert counter.get_total_flops() == flops(2, T, 4, 6, 5, num_groups=2, chunk_size=16, decay=decay)


def test_wrong_heads_are_refused():
    q, k, v, _, _ = draw("none", G=3, H=4)
    with pytest.raises(ValueError, match="Hq dividing H"):
        linear_attention(q, k, v)
