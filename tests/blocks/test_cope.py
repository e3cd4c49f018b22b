"""Contextual position encoding against its equations, pair by pair, and its degenerate cases."""

import math

import pytest
import torch

import zoo

DIM, T = 24, 15


def build(**options):
    options = {"num_heads": 4, "num_kv_heads": 2, "num_positions": 6, **options}
    block = zoo.create_block("cope", DIM, dtype=torch.float64, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in block.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * (2 / p.shape[-1] ** 0.5))
    return block


def draw(*shape, seed=2):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def expected(block, x, gate=torch.sigmoid):
    """Outputs of one row x [T, dim]."""
    D, G, table = block.head_dim, block.num_heads // block.num_kv_heads, block.pos_emb[0]
    q, k, v = ((x @ p.weight.T).view(len(x), -1, D) for p in (block.q_proj, block.k_proj, block.v_proj))
    outputs = []
    for i in range(len(x)):
        for h in range(block.num_heads):
            place, logits = 0.0, []
            for j in range(i, -1, -1):
                score = q[i, h] @ k[j, h // G]
                place = place + gate(score / D**0.5)
                at = torch.as_tensor(place).clamp(max=table.shape[1] - 1)
                low, high = math.floor(at.item()), math.ceil(at.item())
                e = table[:, low] * (1 - (at - low)) + table[:, high] * (at - low)
                logits.append((score + q[i, h] @ e) / D**0.5)
            outputs.append(torch.stack(logits).softmax(0) @ v[: i + 1, h // G].flip(0))
    return torch.stack(outputs).view(len(x), -1) @ block.o_proj.weight.T


@pytest.mark.parametrize("options", [{}, {"num_positions": 40, "num_kv_heads": 4}, {"num_positions": 2}])
def test_equations(options):
    block, x = build(**options), draw(1, T, DIM).requires_grad_()
    got, want = block(x), expected(block, x[0])[None]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
    wrt = [x, *block.parameters()]
    for a, b in zip(torch.autograd.grad(got.sin().sum(), wrt), torch.autograd.grad(want.sin().sum(), wrt), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_gates_of_one_are_relative_embeddings(monkeypatch):
    block, x = build(), draw(1, T, DIM)
    monkeypatch.setattr(torch.Tensor, "sigmoid", lambda s: torch.ones_like(s))
    torch.testing.assert_close(block(x)[0], expected(block, x[0], gate=lambda s: 1.0), rtol=0, atol=1e-10)


def test_a_table_of_zeros_is_attention_without_position():
    block = build()
    plain = zoo.create_block("attention", DIM, num_heads=4, num_kv_heads=2, rope=False, dtype=torch.float64)
    with torch.no_grad():
        block.pos_emb.zero_()
        plain.load_state_dict({n: p for n, p in block.state_dict().items() if n != "pos_emb"})
        x = draw(2, T, DIM)
        torch.testing.assert_close(block(x), plain(x), rtol=0, atol=1e-10)


def test_tiles_change_nothing():
    block, x = build(num_positions=50), draw(1, 150, DIM).requires_grad_()
    state = block.init_state(1)
    with torch.no_grad():
        parts = torch.cat([block(part, state=state) for part in x.split([70, 1, 79], 1)], 1)
    y = block(x)
    torch.testing.assert_close(y, parts, rtol=0, atol=1e-10)
    (grad,) = torch.autograd.grad(y[:, :40].sin().sum(), x)
    (want,) = torch.autograd.grad(block(x[:, :40]).sin().sum(), x)
    torch.testing.assert_close(grad, want, rtol=0, atol=1e-10)


def test_packed_documents_are_as_if_alone():
    block, lengths = build(), [1, 8, 4, 2]
    x, docs = draw(1, T, DIM), torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None]
    alone = torch.cat([block(part) for part in x.split(lengths, 1)], 1)
    torch.testing.assert_close(block(x, doc_ids=docs), alone, rtol=0, atol=1e-10)


def test_errors():
    with pytest.raises(ValueError, match="num_kv_heads"):
        build(num_kv_heads=3)
