"""RAT against its equations, token by token, and the two mixers between which it lies."""

from __future__ import annotations

import pytest
import torch

from zoo.blocks.attention import Attention
from zoo.blocks.rat import RAT

DIM, T = 64, 45


def tokens(seed=1):
    return torch.randn(2, T, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def build(**options):
    torch.manual_seed(0)
    return RAT(DIM, **{"num_heads": 4, **options}, dtype=torch.float64)


def rotate(x, position):
    """x [H, d] by the angles of `position`, pairs (i, i + d/2)."""
    a, b = x.chunk(2, -1)
    angle = position * 10000.0 ** -(torch.arange(8, dtype=torch.float64) / 8)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def naive(block, u):
    """The paper's equations for one row u [T, D]: one token, one query at a time."""
    L, groups, y = block.chunk_size, block.num_groups, []
    ends_k, ends_x, x_run, k_run = [], [], None, None
    for t, row in enumerate(u):
        z, x, g, q, k = block.in_proj(row).split([DIM, DIM, DIM, groups * 16, groups * 16])
        q, k = (torch.stack([h.view(groups, 16)[i % groups] for i in range(4)]) for h in (q, k))
        x, g = x.view(4, 16), torch.sigmoid(g + block.gate_bias).view(4, 16)
        if t % L == 0:
            x_run, k_run = torch.zeros_like(x), torch.zeros_like(k)
        x_run, k_run = g * x_run + (1 - g) * x, g * k_run + (1 - g) * k
        q, k_now = rotate(q, t // L), rotate(k_run, t // L)
        keys, values = torch.stack([*ends_k, k_now]), torch.stack([*ends_x, x_run])
        p = torch.einsum("hd,nhd->hn", q, keys).div(4).softmax(-1)
        y.append(block.out_proj(z.sigmoid() * torch.einsum("hn,nhd->hd", p, values).flatten()))
        if t % L == L - 1:
            ends_k, ends_x = [*ends_k, k_now], [*ends_x, x_run]
    return torch.stack(y)


@pytest.mark.parametrize(("chunk_size", "num_groups"), [(1, 2), (5, 4), (16, 1), (64, 2)])
@torch.no_grad()
def test_rat_is_its_equations(chunk_size, num_groups):
    block, x = build(chunk_size=chunk_size, num_groups=num_groups), tokens()
    want = torch.stack([naive(block, row) for row in x])
    torch.testing.assert_close(block(x), want, atol=1e-11, rtol=1e-11)


@torch.no_grad()
def test_documents_have_their_own_chunks():
    block, x = build(chunk_size=6), tokens()
    ids = torch.tensor([[4] * 7 + [1] * 26 + [8] * 12]).expand(2, T)
    want = torch.stack([torch.cat([naive(block, part) for part in row.split([7, 26, 12])]) for row in x])
    torch.testing.assert_close(block(x, doc_ids=ids), want, atol=1e-11, rtol=1e-11)


@torch.no_grad()
def test_one_token_chunks_without_memory_are_softmax_attention():
    block, x = build(chunk_size=1, num_groups=4), tokens()
    block.gate_bias.fill_(-60)
    other = Attention(DIM, num_heads=4, dtype=torch.float64)
    z, value, _, q, k = block.in_proj.weight.split(DIM)
    for layer, weight in ((other.q_proj, q), (other.k_proj, k), (other.v_proj, value)):
        layer.weight.copy_(weight)
    other.o_proj.weight.copy_(torch.eye(DIM))
    want = block.out_proj((x @ z.T).sigmoid() * other(x))
    torch.testing.assert_close(block(x), want, atol=1e-11, rtol=1e-11)


@torch.no_grad()
def test_one_chunk_is_a_gated_linear_rnn():
    block, x = build(chunk_size=T), tokens()
    z, value, gate, _ = block.in_proj(x).split([DIM, DIM, DIM, 64], -1)
    g, h, outputs = torch.sigmoid(gate + block.gate_bias), torch.zeros(2, DIM, dtype=torch.float64), []
    for t in range(T):
        h = g[:, t] * h + (1 - g[:, t]) * value[:, t]
        outputs.append(h)
    want = block.out_proj(z.sigmoid() * torch.stack(outputs, 1))
    torch.testing.assert_close(block(x), want, atol=1e-11, rtol=1e-11)


def test_fresh_gates_remember_at_most_a_chunk():
    block = build(chunk_size=16)
    assert block.gate_bias.min() >= 0 and block.gate_bias.exp().max() <= 15
