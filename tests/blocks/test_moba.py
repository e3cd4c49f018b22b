"""MoBA against a loop written from its equations, and its degenerate cases."""

import pytest
import torch

from zoo.blocks import MoBA
from zoo.registry import create


def build(seed=0, dim=24, **options):
    torch.manual_seed(seed)
    block = create("moba", dim, dtype=torch.float64, **{"num_heads": 4, "num_kv_heads": 2, "block_size": 4, **options})
    for p in block.parameters():  # larger than at initialisation, so that attention is far from uniform
        torch.nn.init.normal_(p, std=2 / dim**0.5)
    return block


def draw(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rotate(x, position, base=10000.0):
    half = x.shape[-1] // 2
    angle = position * base ** (-torch.arange(half, dtype=x.dtype) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def oracle(block, x):
    """One row x [T, D], token by token and head by head, from the equations of the paper."""
    T, size, D = x.shape[0], block.block_size, block.head_dim
    q, k, v = ((x @ p.weight.T).unflatten(-1, (-1, D)) for p in (block.q_proj, block.k_proj, block.v_proj))
    q = torch.stack([rotate(q[t], t) for t in range(T)])
    if block.k_conv1d is not None:  # k' = k + silu(sum_w W[:, w] k_{t - (W-1) + w})
        taps, flat = block.k_conv1d.weight[:, 0], k.flatten(1)
        past = torch.cat([flat.new_zeros(taps.shape[1] - 1, flat.shape[1]), flat])
        near = sum(taps[:, w] * past[w : w + T] for w in range(taps.shape[1]))
        k = (flat + torch.nn.functional.silu(near)).view_as(k)
    k = torch.stack([rotate(k[t], t) for t in range(T)])
    group = block.num_heads // block.num_kv_heads
    rows = []
    for t in range(T):
        heads = []
        for h in range(block.num_heads):
            keys, values = k[:, h // group], v[:, h // group]
            past = range(t // size)
            gate = {n: (q[t, h] @ keys[n * size : (n + 1) * size].mean(0)).item() for n in past}
            best = sorted(past, key=lambda n: (-gate[n], n))[: block.top_k - 1]
            seen = [j for j in range(t + 1) if j // size in best or j // size == t // size]
            p = torch.softmax(keys[seen] @ q[t, h] / D**0.5, 0)
            heads.append(p @ values[seen])
        rows.append(torch.cat(heads))
    return torch.stack(rows) @ block.o_proj.weight.T


@pytest.mark.parametrize("top_k,size", [(1, 4), (2, 4), (3, 4), (3, 1), (2, 7), (3, 64)])
def test_equations(top_k, size):
    block, x = build(top_k=top_k, block_size=size), draw(2, 29, 24)
    expected = torch.stack([oracle(block, row) for row in x])
    torch.testing.assert_close(block(x), expected, rtol=1e-9, atol=1e-9)
    for kernel in ("chunked", "reference"):
        block.kernel = kernel
        torch.testing.assert_close(block(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("width", [1, 3, 5])
def test_equations_with_key_convolution(width):
    block, x = build(top_k=2, key_conv=width), draw(2, 29, 24)
    expected = torch.stack([oracle(block, row) for row in x])
    torch.testing.assert_close(block(x), expected, rtol=1e-9, atol=1e-9)


def test_top_k_of_one_is_block_diagonal():
    # the released kernel silently becomes full attention here
    block, x = build(top_k=1), draw(1, 12, 24)
    other = x.clone()
    other[:, :8] += 1
    torch.testing.assert_close(block(x)[:, 8:], block(other)[:, 8:], rtol=0, atol=0)
    block.rope_base = None  # without positions each block alone gives the same
    parts = torch.cat([block(part) for part in x.split(4, 1)], 1)
    torch.testing.assert_close(block(x), parts, rtol=1e-12, atol=1e-12)


def test_all_blocks_is_attention():
    block, x = build(top_k=99), draw(2, 30, 24)
    dense = create("attention", 24, num_heads=4, num_kv_heads=2, dtype=torch.float64)
    dense.load_state_dict(block.state_dict())
    torch.testing.assert_close(block(x), dense(x), rtol=1e-10, atol=1e-10)


def test_the_future_changes_nothing():
    block, x = build(top_k=2, key_conv=3), draw(1, 27, 24)
    for t in (1, 4, 13, 16, 26):
        other = x.clone()
        other[:, t:] = draw(1, 27 - t, 24, seed=t)
        torch.testing.assert_close(block(x)[:, :t], block(other)[:, :t], rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"key_conv": 3}, {"qk_norm": "head", "rope": False}])
def test_packed_documents_are_as_if_alone(options):
    block, x = build(top_k=2, **options), draw(1, 37, 24).requires_grad_()
    lengths = [1, 9, 3, 4, 14, 6]
    ids = torch.cat([torch.full((n,), 10 - i) for i, n in enumerate(lengths)])[None]
    weight = draw(1, 37, 24, seed=3)
    packed = block(x, doc_ids=ids)
    alone = torch.cat([block(part) for part in x.split(lengths, 1)], 1)
    torch.testing.assert_close(packed, alone, rtol=1e-10, atol=1e-10)
    leaves = [x, *block.parameters()]
    together, apart = (torch.autograd.grad((y * weight).sum(), leaves) for y in (packed, alone))
    torch.testing.assert_close(together, apart, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("max_len", [None, 150])
@pytest.mark.parametrize("cut", [[1] * 150, [150], [37, 1, 1, 60, 4, 47], [4] * 37 + [2]])
def test_segments(cut, max_len):
    block, x = build(top_k=3, key_conv=3), draw(2, 150, 24)
    whole = block(x)
    with torch.no_grad():
        state = block.init_state(2, max_len)
        parts = [block(part, state=state) for part in x.split(cut, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_rows_at_different_lengths_and_reorder():
    block, x = build(top_k=2), draw(3, 30, 24)
    state = block.init_state(3, 64)
    block(x[:, :13], state=state)
    state.reset(torch.tensor([1]))
    state.reorder(torch.tensor([2, 1, 2]))
    out = block(x[:, 13:], state=state)
    fresh = block(x[1:2, 13:])
    torch.testing.assert_close(out[1:2], fresh, rtol=1e-9, atol=1e-9)
    went_on = block(torch.cat([x[2:3, :13], x[:1, 13:]], 1))[:, 13:]
    torch.testing.assert_close(out[:1], went_on, rtol=1e-9, atol=1e-9)


def test_key_convolution_starts_as_nothing_and_learns():
    torch.manual_seed(0)
    block, x = create("moba", 32, num_heads=2, block_size=4, key_conv=3), torch.randn(1, 20, 32)
    plain = create("moba", 32, num_heads=2, block_size=4)
    plain.load_state_dict({k: v for k, v in block.state_dict().items() if k != "k_conv1d.weight"})
    torch.testing.assert_close(block(x), plain(x))
    block(x).square().sum().backward()
    assert block.k_conv1d.weight.grad.abs().sum() > 0


def test_state_bytes_and_errors():
    block = MoBA(32, num_heads=2, block_size=8, key_conv=4)
    assert block.init_state(3, 50).nbytes == block.state_bytes(3, 50)
    with pytest.raises(ValueError, match="must divide num_heads"):
        MoBA(32, num_heads=3, num_kv_heads=2)
    with pytest.raises(ValueError, match="even"):
        MoBA(32, num_heads=2, head_dim=5)
    with pytest.raises(ValueError, match="kernel"):
        MoBA(32, kernel="fastest")
