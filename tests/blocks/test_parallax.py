"""Parallax against its equation, pair by pair, attention, and the identities of local linear attention."""

import pytest
import torch

import zoo

DIM, T = 24, 17


def build(**options):
    options = {"num_heads": 4, "num_kv_heads": 2, "rope": False, **options}
    block = zoo.create_block("parallax", DIM, dtype=torch.float64, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in block.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * p.shape[-1] ** -0.5)
    return block


def draw(*shape, seed=2):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def heads(block, x):
    projections = (block.q_proj, block.r_proj, block.k_proj, block.v_proj)
    return ((x @ p.weight.T).view(len(x), -1, block.head_dim) for p in projections)


def expected(block, x):
    """Outputs of one row x [T, dim]: mean minus covariance."""
    D, G = block.head_dim, block.num_heads // block.num_kv_heads
    q, r, k, v = heads(block, x)
    outputs = []
    for i in range(len(x)):
        for h in range(block.num_heads):
            keys, values = k[: i + 1, h // G], v[: i + 1, h // G]
            p = (keys @ q[i, h] * D**-0.5).softmax(0)
            mean_k, mean_v = p @ keys, p @ values
            covariance = sum(w * torch.outer(a - mean_v, b - mean_k) for w, a, b in zip(p, values, keys, strict=True))
            outputs.append(mean_v - covariance @ r[i, h])
    return torch.stack(outputs).view(len(x), -1) @ block.o_proj.weight.T


@pytest.mark.parametrize("options", [{}, {"num_kv_heads": 4}])
def test_equations(options):
    block, x = build(**options), draw(1, T, DIM).requires_grad_()
    got, want = block(x), expected(block, x[0])[None]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
    wrt = [x, *block.parameters()]
    for a, b in zip(torch.autograd.grad(got.sin().sum(), wrt), torch.autograd.grad(want.sin().sum(), wrt), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_starts_as_attention():
    block = zoo.create_block("parallax", DIM, num_heads=4, num_kv_heads=2, dtype=torch.float64)
    plain = zoo.create_block("attention", DIM, num_heads=4, num_kv_heads=2, dtype=torch.float64)
    plain.load_state_dict({n: p for n, p in block.state_dict().items() if not n.startswith("r_proj")})
    x = draw(2, T, DIM)
    torch.testing.assert_close(block(x), plain(x), rtol=0, atol=1e-10)


def test_local_linear_attention_fits_linear_values_exactly():
    """r = rho omega / (omega - mu . rho), Sigma rho = mu, is the local linear fit: exact where v = A k + b."""
    from zoo.blocks.parallax import _tile

    D, n = 4, 12
    k, q, A, b = draw(n, D), draw(D, seed=3), draw(D, D, seed=4), draw(D, seed=5)
    w, z = (k @ q * D**-0.5).exp(), k - q
    mu, sigma = w @ z, torch.einsum("n,na,nb->ab", w, z, z)
    rho = torch.linalg.solve(sigma, mu)
    r = rho * w.sum() / (w.sum() - mu @ rho)
    o = _tile(*(y.view(1, -1, 1, D) for y in (q, r, k, k @ A.T + b)), torch.ones(1, 1, n).bool())
    torch.testing.assert_close(o.flatten(), A @ q + b, rtol=0, atol=1e-9)


@pytest.mark.parametrize("length", [T, 150])
def test_segments(length):
    block, x = build(rope=True), draw(2, length, DIM)
    state = block.init_state(2)
    with torch.no_grad():
        got = torch.cat([block(part, state=state) for part in x.split([9, 1, 1, length - 11], 1)], 1)
    torch.testing.assert_close(got, block(x), rtol=0, atol=1e-10)


def test_packed_documents_are_as_if_alone():
    block, lengths = build(rope=True), [1, 9, 4, 3]
    x, docs = draw(1, T, DIM), torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None]
    alone = torch.cat([block(part) for part in x.split(lengths, 1)], 1)
    torch.testing.assert_close(block(x, doc_ids=docs), alone, rtol=0, atol=1e-10)
