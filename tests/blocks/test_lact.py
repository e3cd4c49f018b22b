"""LaCT against its equations with the gradient by autograd, and the closed forms and bounds of the paper."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from zoo.blocks.fast_weights import ascent, ascent_flops, orthogonalise, read, read_flops
from zoo.blocks.lact import LaCT

DIM, T, HEADS, FAST = 32, 45, 2, 4


def build(**options):
    torch.manual_seed(0)
    block = LaCT(DIM, **{"num_heads": HEADS, "chunk_size": 12, "window": 15, **options}, dtype=torch.float64)
    with torch.no_grad():  # steps that matter, scales and offsets that do something
        block.lr_proj.bias.fill_(7.0)
        block.qk_scale.add_(0.3 * torch.randn_like(block.qk_scale))
        block.qk_offset.add_(0.3 * torch.randn_like(block.qk_offset))
    return block


def tokens(seed=1, length=T):
    return torch.randn(2, length, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rms(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def rotate(x, base=500000.0):
    """x [T, H, d] by the angles of 0..T-1, pairs (i, i + d/2)."""
    half = x.shape[-1] // 2
    angle = torch.arange(len(x), dtype=torch.float64)[:, None] * base ** -(torch.arange(half).double() / half)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def polar(g):
    """The released coefficients, on one matrix."""
    x = g.T if g.shape[0] > g.shape[1] else g
    x = x / (x.norm() + 1e-7)
    for a, b, c in (
        (4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046), (2.8366, -3.0525, 1.2012),
    ):  # fmt: skip
        x = a * x + b * (x @ x.T @ x) + c * (x @ x.T @ x @ x.T @ x)
    return x.T if g.shape[0] > g.shape[1] else x


def network(w0, w1, w2, x):
    return (F.silu(x @ w0.T) * (x @ w2.T)) @ w1.T


def naive(block, u):
    """One row u [T, D]; each fast head by itself, the gradient by autograd."""
    width, C = DIM // FAST, block.chunk_size
    q, k, v = block.qkv(u).chunk(3, -1)
    q, k = rms(q, block.q_norm.weight), rms(k, block.k_norm.weight)
    heads = [h.view(len(u), HEADS, -1) for h in (q, k, v)]
    scores = torch.einsum("ihd,jhd->hij", rotate(heads[0]), rotate(heads[1])) / (DIM // HEADS) ** 0.5
    i = torch.arange(len(u))
    far_away = (i[:, None] < i) | (i[:, None] - i >= block.window)
    near = torch.einsum("hij,jhd->ihd", scores.masked_fill(far_away, float("-inf")).softmax(-1), heads[2]).flatten(1)

    def unit(x, column):
        x = F.silu(x * block.qk_scale[:, column] + block.qk_offset[:, column]).view(len(u), FAST, width)
        x = x / (x.norm(dim=-1, keepdim=True) + 1e-5)
        return rotate(x.reshape(len(u), HEADS, -1)).reshape(len(u), FAST, width)

    q, k, v = unit(q, 0), unit(k, 1), F.silu(v).view(len(u), FAST, width)
    base = torch.tensor(1e-3, dtype=torch.float64).expm1().log()
    rates = F.softplus(block.lr_proj(u) + base).view(len(u), FAST, 3)
    outputs = []
    for h in range(FAST):
        w = [p() if callable(p) else p for p in (block.w0, block.w1, block.w2)]
        w = [p[h].detach().clone() for p in w]
        lengths, last, out = [p.norm(dim=1, keepdim=True) for p in w], [torch.zeros_like(p) for p in w], []
        for start in range(0, len(u), C):
            at = slice(start, start + C)
            out.append(network(*w, q[at, h]))
            leaf = [p.clone().requires_grad_() for p in w]
            gain = (network(*leaf, k[at, h]) * v[at, h]).sum(-1)
            steps = [
                torch.autograd.grad((gain * rates[at, h, n]).sum(), leaf[n], retain_graph=True)[0] for n in range(3)
            ]
            if block.momentum_proj is not None:
                beta = block.momentum_proj(u)[at, h].sigmoid().mean()
                last = steps = [g + beta * old for g, old in zip(steps, last)]
            if block.muon:
                steps = [polar(g) for g in steps]
            w = [p + g for p, g in zip(w, steps)]
            w = [p / (p.norm(dim=1, keepdim=True) + 1e-5) * n for p, n in zip(w, lengths)]
        outputs.append(torch.cat(out))
    far = rms(torch.stack(outputs, 1), block.ttt_norm.weight)
    if block.ttt_scale_proj is not None:
        far = far * F.silu(block.ttt_scale_proj(u))[..., None]
    return block.o_proj(near + far.flatten(1)).detach()


MODES = [
    {},
    {"momentum": True, "output_scale": True, "inter_multi": 1.5},
    {"momentum": True, "muon": True, "low_rank": 3, "inter_multi": 0.5},
]


@pytest.mark.parametrize("options", MODES)
def test_lact_is_its_equations(options):
    block, x = build(**options), tokens()
    want = torch.stack([naive(block, row) for row in x])
    torch.testing.assert_close(block(x).detach(), want, atol=1e-10, rtol=1e-10)
    block.chunk_size = T
    assert (block(x) - want)[:, 12:].abs().max() > 1e-2  # the training is no detail


@pytest.mark.parametrize("options", [*MODES, {"chunk_size": 64, "window": 64}])
def test_documents_are_trained_apart(options):
    block, x = build(**options), tokens()
    ids = torch.tensor([[4] * 7 + [1] * 26 + [8] * 12]).expand(2, T)
    want = torch.stack([torch.cat([naive(block, part) for part in row.split([7, 26, 12])]) for row in x])
    torch.testing.assert_close(block(x, doc_ids=ids).detach(), want, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("options", MODES)
@torch.no_grad()
def test_streaming_learns_when_a_chunk_is_full(options):
    block, x = build(**options), tokens()
    want = block(x)
    for cut in ([12, 12, 12, 9], [1] * T, [11, 2, 23, 9]):
        state = block.init_state(2, T)
        got = torch.cat([block(part, state=state) for part in x.split(cut, 1)], 1)
        torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)
    state = block.init_state(2)
    block(x[:, :11], state=state)
    assert not any(w.any() for w in state.moved)  # eleven of twelve tokens teach nothing yet
    block(x[:, 11:12], state=state)
    assert all(w.any() for w in state.moved)


def test_no_token_reads_its_own_chunk():
    block = build()
    gen = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 36, FAST, 8, generator=gen, dtype=torch.float64, requires_grad=True) for _ in range(3))
    far = block._chunks(q, k, v, torch.rand(1, 36, 12, generator=gen, dtype=torch.float64))
    for t, seen in ((0, 0), (11, 0), (12, 12), (23, 12), (35, 24)):
        for source in (k, v):
            (g,) = torch.autograd.grad(far[:, t].sum(), source, retain_graph=True, allow_unused=True)
            reach = (torch.zeros_like(source) if g is None else g)[0].abs().sum((1, 2)) > 0
            assert reach[:seen].all() and not reach[seen:].any()


def test_ascent_is_the_gradient():
    gen = torch.Generator().manual_seed(0)
    weights = [
        torch.randn(2, 3, *s, generator=gen, dtype=torch.float64, requires_grad=True) for s in ((6, 4), (4, 6), (6, 4))
    ]
    k, v = (torch.randn(2, 9, 3, 4, generator=gen, dtype=torch.float64) for _ in range(2))
    rates = torch.rand(2, 9, 3, 3, generator=gen, dtype=torch.float64)
    gain = (read(weights, k) * v).sum(-1)
    for n, (step, w) in enumerate(zip(ascent(weights, k, v, rates), weights)):
        (want,) = torch.autograd.grad((gain * rates[..., n]).sum(), w, retain_graph=True)
        torch.testing.assert_close(step, want, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("shape", [(24, 24), (24, 8), (8, 24)])
def test_orthogonalised_steps_have_singular_values_near_one(shape):
    g = torch.randn(5, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, s, v = torch.linalg.svd(g, full_matrices=False)
    got = orthogonalise(g, torch.float64)
    flat = torch.linalg.svdvals(got)[s / s[:, :1] > 0.02]  # a smaller one needs more than five steps
    assert flat.min() > 0.9 and flat.max() < 1.2
    diagonal = u.mT @ got @ v.mT
    off = diagonal - torch.diag_embed(diagonal.diagonal(dim1=-2, dim2=-1))
    assert off.abs().max() < 1e-10  # the singular vectors stay


@torch.no_grad()
def test_rows_keep_their_lengths_and_rate_zero_keeps_the_weights():
    x = tokens()
    for bias, moves in ((7.0, True), (-60.0, False)):
        block = build(momentum=True)
        block.lr_proj.bias.fill_(bias)
        state = block.init_state(2)
        block(x, state=state)
        for w0, moved in zip((block.w0, block.w1, block.w2), state.moved):
            torch.testing.assert_close((w0 + moved).norm(dim=-1), w0.norm(dim=-1).expand(2, -1, -1), atol=0, rtol=1e-4)
            assert bool(moved.abs().max() > 0.1) == moves and (moves or moved.abs().max() < 1e-4)


def test_fresh_rates_and_parameters_are_those_of_the_release():
    block = LaCT(1024, device="meta", momentum=True, output_scale=True)
    shapes = {n: tuple(p.shape) for n, p in block.named_parameters()}
    assert shapes == {
        "qkv.weight": (3072, 1024), "q_norm.weight": (1024,), "k_norm.weight": (1024,), "qk_scale": (1024, 2),
        "qk_offset": (1024, 2), "w0": (4, 256, 256), "w1": (4, 256, 256), "w2": (4, 256, 256),
        "lr_proj.weight": (12, 1024), "lr_proj.bias": (12,), "momentum_proj.weight": (4, 1024),
        "momentum_proj.bias": (4,), "ttt_scale_proj.weight": (4, 1024), "ttt_scale_proj.bias": (4,),
        "ttt_norm.weight": (256,), "o_proj.weight": (1024, 1024),
    }  # fmt: skip
    rates = LaCT(64)._rates(torch.zeros(1, 1, 64))
    torch.testing.assert_close(rates, torch.full_like(rates, 1e-3))


def test_size_of_the_state_and_of_the_work():
    plain, momentum = (LaCT(2048, device="meta", momentum=m) for m in (False, True))
    assert 12.5e6 < momentum.state_bytes(1, 1) - plain.state_bytes(1, 1) < 12.7e6
    assert read_flops(1, 512, 512) + ascent_flops(1, 512, 512) == 18 * 512 * 512
