"""Hierarchical sparse attention against its equations, token by token, and the laws of stick breaking."""

import pytest
import torch

import zoo

DIM, T = 24, 37


def build(**options):
    options = {"num_heads": 4, "num_kv_heads": 2, "retrieval_dim": 10, "chunk_size": 5, "top_k": 3, **options}
    block = zoo.create_block("hsa", DIM, dtype=torch.float64, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in block.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * (2 / p.shape[-1] ** 0.5))
    return block


def draw(*shape, seed=2):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def heads(x, linear, width):
    return (x @ linear.weight.T).unflatten(-1, (-1, width))


def oracle(block, x):
    """One row x [T, DIM], token by token and head by head; sticks are broken one after the other."""
    D, size = block.head_dim, block.chunk_size
    q, k, v = (heads(x, p, D) for p in (block.q_proj, block.k_proj, block.v_proj))
    if block.k_norm is not None:
        k = k / (k.square().mean(-1, keepdim=True) + 1e-6).sqrt() * block.k_norm.weight
    r = heads(x, block.retrieval_proj, block.retrieval_dim)
    out = torch.zeros_like(q)
    for t in range(len(x)):
        for h in range(block.num_heads):
            g = h // (block.num_heads // block.num_kv_heads)
            e = g // (block.num_kv_heads // block.num_retrieval_heads)
            score = {}
            for c in range(t // size):  # chunks that have ended before t
                mean = x[c * size : (c + 1) * size].mean(0)
                landmark = heads(mean, block.landmark_proj, block.retrieval_dim)[e]
                score[c] = r[t, e] @ landmark / block.retrieval_dim**0.5
            best = sorted(score, key=lambda c: (-score[c].item(), c))[: block.top_k]
            left, weight = 1.0, {}
            for c in sorted(best, reverse=True):
                weight[c] = left * score[c].sigmoid()
                left = left * (1 - score[c].sigmoid())
            if block.weights == "softmax" and best:
                weight = dict(zip(best, torch.stack([score[c] for c in best]).softmax(0), strict=True))
            for c in best:
                inside = slice(c * size, (c + 1) * size)
                p = (k[inside, g] @ q[t, h] / D**0.5).softmax(0)
                out[t, h] += weight[c] * (p @ v[inside, g])
    return out.flatten(1) @ block.o_proj.weight.T


CASES = [
    {},
    {"k_norm": True, "num_retrieval_heads": 1},
    {"weights": "softmax", "top_k": 2},
    {"chunk_size": 1, "top_k": 99},
    {"num_kv_heads": 4, "num_retrieval_heads": 2, "chunk_size": 8, "top_k": 1},
]


@pytest.mark.parametrize("options", CASES)
@pytest.mark.parametrize("length", [1, 5, 6, T])
def test_equations(options, length):
    block, x = build(**options), draw(2, length, DIM)
    expected = torch.stack([oracle(block, row) for row in x])
    torch.testing.assert_close(block(x), expected, rtol=1e-9, atol=1e-9)


def test_chunks_of_one_token_are_stick_breaking_attention():
    """No positions: the newest token that is liked takes what it wants, and so on back."""
    block, x = build(chunk_size=1, top_k=T, num_kv_heads=4), draw(1, T, DIM)
    r, mark = (heads(x[0], p, 10).transpose(0, 1) for p in (block.retrieval_proj, block.landmark_proj))
    s = (r @ mark.mT / 10**0.5).tril(-1)
    wants = s.sigmoid().tril(-1)
    left = (1 - wants).flip(-1).cumprod(-1).flip(-1)  # of the token and those after it
    p = wants * left / (1 - wants)
    v = heads(x[0], block.v_proj, 6).transpose(0, 1)
    expected = (p @ v).transpose(0, 1).flatten(1) @ block.o_proj.weight.T
    torch.testing.assert_close(block(x)[0], expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_scores_at_their_ends():
    """A newest chunk that is loved is all there is; where nothing is liked the output is zero, not uniform."""
    block, x = build(num_heads=1, num_kv_heads=1, retrieval_dim=DIM), draw(1, 20, DIM)
    x[..., 0] = 1
    for p in (block.retrieval_proj, block.landmark_proj):
        p.weight.zero_()[0, 0] = 20
    newest = block(x)[0, 19]
    only = build(num_heads=1, num_kv_heads=1, retrieval_dim=DIM, top_k=1, weights="softmax")
    only.load_state_dict(block.state_dict())
    torch.testing.assert_close(newest, only(x[:, 10:])[0, 9], rtol=1e-9, atol=1e-9)
    block.landmark_proj.weight.neg_()
    assert block(x).abs().max() < 1e-9
    assert block(x[:, :5]).abs().max() == 0


def test_order_inside_a_chunk_does_not_matter():
    block, x = build(), draw(1, T, DIM)
    y = block(x)
    shuffled = torch.cat([x[:, [3, 0, 4, 1, 2]], x[:, 5:]], 1)
    torch.testing.assert_close(block(shuffled)[:, 5:], y[:, 5:], rtol=1e-9, atol=1e-9)


def test_retrieval_learns_from_the_output():
    block, x = build(), draw(1, T, DIM)
    block(x).square().sum().backward()
    for p in (block.retrieval_proj, block.landmark_proj):
        assert p.weight.grad.abs().max() > 1e-3
    weight = build(top_k=7)._weights(draw(2, 3, 4, 6), torch.rand(2, 3, 4, 6) < 0.7)
    assert (weight >= 0).all() and (weight.sum(-1) < 1).all()


def test_long_sequences_are_done_in_parts(monkeypatch):
    block, x = build(), draw(2, T, DIM).requires_grad_()
    whole = block(x)
    expected = torch.autograd.grad(whole.square().sum(), [x, *block.parameters()])
    monkeypatch.setattr("zoo.blocks.hsa.ELEMENTS_AT_ONCE", 1000)
    assert len(block._parts(2, T, 8)) > 3
    parts = block(x)
    torch.testing.assert_close(parts, whole, rtol=1e-10, atol=1e-10)
    got = torch.autograd.grad(parts.square().sum(), [x, *block.parameters()])
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_errors():
    with pytest.raises(ValueError, match="must divide num_kv_heads"):
        zoo.create_block("hsa", 64, num_heads=4, num_kv_heads=2, num_retrieval_heads=4)
    with pytest.raises(ValueError, match="must divide num_heads"):
        zoo.create_block("hsa", 64, num_heads=4, num_kv_heads=3)
