"""Taylor linear attention, with and without a prefix, against the quotients of sums in the papers."""

from __future__ import annotations

import pytest
import torch

from zoo.blocks.based import Based, taylor_features

DIM, T = 64, 45


def tokens(seed=1, length=T):
    return torch.randn(2, length, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def build(cls, **options):
    torch.manual_seed(0)
    return cls(DIM, num_heads=4, feature_dim=6, chunk_size=16, dtype=torch.float64, **options)


def heads(projection, x):
    return projection(x).unflatten(-1, (4, -1))


def paper_features(x):
    """The paper's map, all products kept: 1 + d + d^2 features."""
    d = x.shape[-1]
    outer = (x[..., :, None] * x[..., None, :]).flatten(-2)
    return torch.cat([torch.ones_like(x[..., :1]), x / d**0.25, outer / (2 * d) ** 0.5], -1)


def test_features_are_the_taylor_series():
    q, k = torch.randn(2, 7, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    s = (q * k).sum(-1) / 4
    assert taylor_features(q).shape[-1] == 153 and paper_features(q).shape[-1] == 273
    for phi in (taylor_features, paper_features):
        torch.testing.assert_close((phi(q) * phi(k)).sum(-1), 1 + s + s * s / 2, atol=1e-12, rtol=1e-12)


def test_based_is_the_recurrence_of_the_paper():
    block, x = build(Based), tokens()
    q, k, v = heads(block.q_proj, x), heads(block.k_proj, x), heads(block.v_proj, x)
    q, k = paper_features(q), paper_features(k)
    S = torch.zeros(2, 4, q.shape[-1], v.shape[-1], dtype=torch.float64)
    z, outputs = torch.zeros_like(S[..., 0]), []
    for t in range(T):
        S = S + k[:, t, ..., None] * v[:, t, :, None]
        z = z + k[:, t]
        numerator = torch.einsum("bhf,bhfd->bhd", q[:, t], S)
        outputs.append(numerator / ((q[:, t] * z).sum(-1, keepdim=True) + 1e-12))
    want = block.o_proj(torch.stack(outputs, 1).flatten(2))
    torch.testing.assert_close(block(x), want, atol=1e-11, rtol=1e-11)


def test_the_state_is_that_of_the_paper_without_duplicates():
    block = Based(1024, num_heads=16, device="meta")
    assert block.state_bytes(1, 1) == 16 * 153 * 65 * 4
    assert sum(p.numel() for p in block.parameters()) == 2 * 256 * 1024 + 2 * 1024 * 1024


@torch.no_grad()
def test_near_softmax_for_small_scores():
    """exp(s) = 1 + s + s^2/2 + O(s^3), so q an eighth as large is 512 times nearer to softmax."""
    block, x = build(Based), tokens()
    gaps = []
    for _ in range(2):
        block.q_proj.weight *= 0.125
        q, k, v = heads(block.q_proj, x), heads(block.k_proj, x), heads(block.v_proj, x)
        s = torch.einsum("bihd,bjhd->bhij", q, k) / 6**0.5
        p = s.masked_fill(~torch.ones(T, T, dtype=torch.bool).tril(), float("-inf")).softmax(-1)
        want = block.o_proj(torch.einsum("bhij,bjhd->bihd", p, v).flatten(2))
        gaps.append((block(x) - want).abs().max())
    assert (gaps[0] / gaps[1]).item() == pytest.approx(8**3, rel=0.3)
