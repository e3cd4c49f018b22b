"""Delta rule: the chunked form against the token loop and Hugging Face, and what the mathematics promises."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from zoo.kernels.delta_rule import delta_rule, flops
from zoo.kernels.linear_attention import linear_attention

KINDS = ("none", "head", "channel")


def draw(kind, T=37, B=2, H=4, G=2, Dk=6, Dv=5, strength=1.0, dtype=torch.float64, seed=0):
    gen = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=gen, dtype=torch.float64).to(dtype)

    shape = {"none": None, "head": (B, T, H), "channel": (B, T, H, Dk)}[kind]
    g = None if shape is None else strength * F.logsigmoid(normal(*shape))
    q, k = normal(B, T, G, Dk), F.normalize(normal(B, T, G, Dk), dim=-1)
    return q, k, normal(B, T, H, Dv), 2 * normal(B, T, H).sigmoid(), g, normal(B, H, Dk, Dv)


def packed(B, lengths):
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).expand(B, -1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T", [1, 2, 3, 4, 16, 17, 37, 64])
@pytest.mark.parametrize("docs", [False, True])
def test_chunked_is_the_loop_forward_and_backward(kind, T, docs):
    inputs = [x if x is None else x.requires_grad_() for x in draw(kind, T)]
    *given, S = inputs
    cut = max(T // 3, 1)
    ids = packed(2, [n for n in (cut, 1, T - cut - 1) if n > 0] if T > 1 else [1]) if docs else None
    results = []
    for backend, chunk in (("reference", 64), ("chunked", 16), ("chunked", 8)):
        o, final = delta_rule(*given, scale=0.7, initial_state=S, doc_ids=ids, chunk_size=chunk, backend=backend)
        weight = torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view_as(o)
        loss = (o * weight).sum() + (final * final.detach().cos()).sum()
        results.append((o, final, *torch.autograd.grad(loss, [x for x in inputs if x is not None])))
    for other in results[1:]:
        for want, got in zip(results[0], other):
            torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    q, k, v, beta, g, S = draw(kind, T=9, B=1, H=2, G=1, Dk=3, Dv=2)
    given = [x.requires_grad_() for x in (q, k, v, beta, S, g) if x is not None]

    def run(q, k, v, beta, S, g=None):
        return delta_rule(q, k, v, beta, g, initial_state=S, chunk_size=4)

    assert torch.autograd.gradcheck(run, given)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cuts", [(1,), (16, 17, 19), (5, 6, 30)])
def test_any_cut_gives_the_same(kind, cuts):
    *given, S = draw(kind)
    want, final = delta_rule(*given, initial_state=S, chunk_size=8)
    got = []
    for a, b in itertools.pairwise((0, *cuts, 37)):
        part = [x if x is None else x[:, a:b] for x in given]
        o, S = delta_rule(*part, initial_state=S, chunk_size=8)
        got.append(o)
    torch.testing.assert_close(torch.cat(got, 1), want, atol=1e-11, rtol=1e-11)
    torch.testing.assert_close(S, final, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("gated", [False, True])
def test_is_hugging_face_gated_delta_rule(gated):
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule as oracle

    q, k, v, beta, g, S = draw("head", G=4)
    g = g if gated else torch.zeros_like(g)
    want, final = oracle(q, k, v, g, beta, initial_state=S, output_final_state=True)
    o, mine = delta_rule(q, k, v, beta, g if gated else None, scale=q.shape[-1] ** -0.5, initial_state=S)
    torch.testing.assert_close(o, want.to(o.dtype), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mine, final.to(o.dtype), atol=1e-5, rtol=1e-5)


def test_orthonormal_keys_make_it_linear_attention():
    q, _, v, beta, g, _ = draw("head", T=6, G=4)
    k = torch.linalg.qr(torch.randn(2, 4, 6, 6, dtype=torch.float64)).Q.transpose(1, 2)
    got, _ = delta_rule(q, k, v, beta, g)
    want, _ = linear_attention(q, k, beta[..., None] * v, g)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)


def test_write_then_read_and_beta_zero():
    q, k, v, beta, g, S = draw("head", G=4)
    o, _ = delta_rule(k, k, v, torch.ones_like(beta), g, initial_state=S)
    torch.testing.assert_close(o, v, atol=1e-11, rtol=1e-11)  # unit keys: what was written is read back
    o, final = delta_rule(q, k, v, torch.zeros_like(beta), g, initial_state=S)
    torch.testing.assert_close(final, S * g.sum(1).exp()[..., None, None])


def test_equal_channel_decays_are_a_head_decay():
    q, k, v, beta, g, S = draw("head")
    want, _ = delta_rule(q, k, v, beta, g, initial_state=S)
    got, _ = delta_rule(q, k, v, beta, g[..., None].expand(*g.shape, 6), initial_state=S)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("kind", ["head", "channel"])
@pytest.mark.parametrize("strength", [1.0, 20.0, 200.0])
def test_strong_decay_is_finite_and_exact(kind, strength):
    double = draw(kind, T=150, strength=strength)[:5]
    want, _ = delta_rule(*double, backend="reference")
    single = [x.float().requires_grad_() for x in double]
    got, _ = delta_rule(*single)
    assert (got - want).norm() / want.norm() < 1e-5
    got.square().sum().backward()
    assert all(x.grad.isfinite().all() for x in single)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T", [1, 3, 4, 16, 21, 40])
def test_flops_are_those_executed(kind, T):
    *given, S = draw(kind, T)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        delta_rule(*given, initial_state=S, chunk_size=16)
    want = flops(2, T, 4, 6, 5, num_groups=2, chunk_size=16, channel_decay=kind == "channel")
    assert counter.get_total_flops() == want


def test_wrong_shapes_are_refused():
    q, k, v, beta, _, _ = draw("none")
    with pytest.raises(ValueError, match="beta must be"):
        delta_rule(q, k, v, beta[..., :2])
