"""Landmark attention against its grouped softmax, token by token, and its degenerate cases."""

import pytest
import torch

import zoo

DIM, T = 24, 27


def build(**options):
    options = {"num_heads": 4, "num_kv_heads": 2, "block_size": 5, **options}
    block = zoo.create_block("landmark", DIM, dtype=torch.float64, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in block.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * (2 / p.shape[-1] ** 0.5))
    return block


def draw(*shape, seed=2):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rotate(x, base=10000.0):
    half = x.shape[-1] // 2
    angle = torch.arange(len(x))[:, None, None] * base ** (-torch.arange(half, dtype=x.dtype) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def weights(scores, t, size, top_k):
    """Weight of each token for token t, from its scores [T]; sections are whole but for the last."""
    own, out = t // size, torch.zeros_like(scores)
    landmark = {c: c * size + size - 1 for c in range(own)}
    best = sorted(landmark, key=lambda c: (-scores[landmark[c]].item(), c))[:top_k]
    local = [j for j in range(own * size, t + 1) if j % size != size - 1]
    group = local + [landmark[c] for c in best]
    share = dict(zip(group, scores[group].softmax(0), strict=True))
    for j in local:
        out[j] = share[j]
    for c in best:
        inside = list(range(c * size, c * size + size - 1))
        out[inside] = share[landmark[c]] * scores[inside].softmax(0)
    return out


def expected(block, x):
    """Outputs of one row x [T, dim]."""
    D, G = block.head_dim, block.num_heads // block.num_kv_heads
    q, k, v = ((x @ p.weight.T).view(len(x), -1, D) for p in (block.q_proj, block.k_proj, block.v_proj))
    if block.rope_base:
        q, k = rotate(q), rotate(k)
    outputs = []
    for t in range(len(x)):
        for h in range(block.num_heads):
            p = weights(k[:, h // G] @ q[t, h] * D**-0.5, t, block.block_size, block.top_k)
            assert abs(p.sum().item() - 1) < 1e-12
            outputs.append(p @ v[:, h // G])
    return torch.stack(outputs).view(len(x), -1) @ block.o_proj.weight.T


@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"block_size": 2, "top_k": 1, "rope": False}])
@pytest.mark.parametrize("kernel", ["auto", "chunked"])
def test_equations(options, kernel):
    block, x = build(kernel=kernel, **options), draw(1, T, DIM).requires_grad_()
    got, want = block(x), expected(block, x[0])[None]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
    wrt = [x, *block.parameters()]
    for a, b in zip(torch.autograd.grad(got.sin().sum(), wrt), torch.autograd.grad(want.sin().sum(), wrt), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_parts_change_nothing(monkeypatch):
    block, x = build(), draw(2, T, DIM).requires_grad_()
    y = block(x)
    (want,) = torch.autograd.grad(y.sin().sum(), x)
    monkeypatch.setattr("zoo.blocks.landmark.ELEMENTS_AT_ONCE", 2000)
    assert len(block._parts(2, T, 6)) > 3
    again = block(x)
    torch.testing.assert_close(again, y, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(again.sin().sum(), x)[0], want, rtol=0, atol=1e-12)


def test_values_of_landmarks_and_the_own_landmark_have_no_weight():
    block, x = build(), draw(1, T, DIM)
    with torch.no_grad():
        value = block.v_proj(x)
        gradient = torch.autograd.functional.jacobian(lambda v: _with_values(block, x, v).sum(), value)
    assert (gradient[0, 4:25:5] == 0).all() and (gradient[0, 3:24:5] != 0).all()


def _with_values(block, x, values):
    handle = block.v_proj.register_forward_hook(lambda *_: values)
    try:
        return block(x)
    finally:
        handle.remove()


@pytest.mark.parametrize("cut", [[1] * T, [5, 5, 17], [3, 1, 20, 3]])
def test_segments(cut):
    block, x = build(top_k=2), draw(2, T, DIM)
    state = block.init_state(2)
    got = torch.cat([block(part, state=state) for part in x.split(cut, 1)], 1)
    torch.testing.assert_close(got, block(x), rtol=0, atol=1e-10)


def test_packed_documents_are_as_if_alone():
    block, lengths = build(top_k=2), [1, 13, 4, 9]
    x, docs = draw(1, T, DIM), torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None]
    alone = torch.cat([block(part) for part in x.split(lengths, 1)], 1)
    torch.testing.assert_close(block(x, doc_ids=docs), alone, rtol=0, atol=1e-10)


def test_errors():
    with pytest.raises(ValueError, match="block_size"):
        build(block_size=1)
