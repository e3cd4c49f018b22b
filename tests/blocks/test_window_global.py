"""Window and learned globals against a token loop written from the equations."""

import pytest
import torch
from torch.nn import functional as F

from zoo.registry import create


def build(dim=24, **options):
    torch.manual_seed(0)
    given = {"num_heads": 4, "num_kv_heads": 2, "window": 5, "num_globals": 3, "chunk_size": 4, **options}
    block = create("window_global", dim, dtype=torch.float64, **given)
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
    """One row x [T, D], token by token and head by head."""
    D, group = block.head_dim, block.num_heads // block.num_kv_heads
    q, k, v = ((x @ p.weight.T).unflatten(-1, (-1, D)) for p in (block.q_proj, block.k_proj, block.v_proj))
    s = (x @ block.score_proj.weight.T)[:, 0]
    rows = []
    for t in range(x.shape[0]):
        candidates = range(t // block.chunk_size * block.chunk_size)
        chosen = sorted(candidates, key=lambda j: -s[j].item())[: block.num_globals]
        near = [j for j in range(t + 1) if t - j < block.window]
        far = [j for j in chosen if j not in near]
        heads = []
        for h in range(block.num_heads):
            g = h // group
            logits = [rotate(q[t, h], t) @ rotate(k[j, g], j) / D**0.5 for j in near]
            logits += [q[t, h] @ k[j, g] / D**0.5 + F.logsigmoid(s[j]) for j in far]
            heads.append(torch.softmax(torch.stack(logits), 0) @ v[near + far, g])
        rows.append(torch.cat(heads))
    return torch.stack(rows) @ block.o_proj.weight.T


SIZES = [{}, {"window": 1, "num_globals": 1}, {"window": 2, "chunk_size": 7}, {"chunk_size": 1}, {"num_globals": 50}]


@pytest.mark.parametrize("options", SIZES)
def test_equations_forward_and_gradient(options):
    block, x = build(**options), draw(2, 22, 24).requires_grad_()
    expected, got = torch.stack([oracle(block, row) for row in x]), block(x)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    weight, leaves = draw(2, 22, 24, seed=2), [x, *block.parameters()]
    slow, fast = (torch.autograd.grad((y * weight).sum(), leaves) for y in (expected, got))
    torch.testing.assert_close(fast, slow, rtol=1e-8, atol=1e-9)
    assert fast[-1].abs().sum() > 0  # the score head learns
    block.kernel = "reference"
    torch.testing.assert_close(block(x), expected, rtol=1e-9, atol=1e-9)


def test_degenerates_to_attention():
    x = draw(2, 30, 24)
    for window, other in ((64, None), (6, 6)):
        block = build(num_globals=0, window=window)
        dense = create("attention", 24, num_heads=4, num_kv_heads=2, window=other, dtype=torch.float64)
        dense.load_state_dict(block.state_dict())
        torch.testing.assert_close(block(x), dense(x), rtol=1e-10, atol=1e-10)
    assert sum(p.numel() for p in create("window_global", 32).parameters()) == 4 * 32**2 + 32


def test_the_future_changes_nothing():
    block, x = build(), draw(1, 27, 24)
    for t in (1, 3, 4, 13, 16, 26):
        other = x.clone()
        other[:, t:] = 5 * draw(1, 27 - t, 24, seed=t)
        torch.testing.assert_close(block(x)[:, :t], block(other)[:, :t], rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", SIZES)
def test_packed_documents_are_as_if_alone(options):
    block, x = build(**options), draw(1, 57, 24).requires_grad_()
    lengths = [1, 9, 3, 4, 14, 6, 17, 2, 1]
    ids = torch.cat([torch.full((n,), 10 - i) for i, n in enumerate(lengths)])[None]
    packed = block(x, doc_ids=ids)
    alone = torch.cat([block(part) for part in x.split(lengths, 1)], 1)
    torch.testing.assert_close(packed, alone, rtol=1e-10, atol=1e-10)
    weight, leaves = draw(1, 57, 24, seed=3), [x, *block.parameters()]
    together, apart = (torch.autograd.grad((y * weight).sum(), leaves) for y in (packed, alone))
    torch.testing.assert_close(together, apart, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("options", [*SIZES, {"num_globals": 0}])
@pytest.mark.parametrize("cut", [[1] * 41, [41], [6, 1, 2, 20, 3, 9], [4] * 10 + [1]])
@torch.no_grad()
def test_segments(cut, options):
    block, x = build(**options), draw(2, 41, 24)
    state = block.init_state(2)
    size = state.nbytes
    parts = [block(part, state=state) for part in x.split(cut, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), block(x), rtol=1e-9, atol=1e-9)
    assert state.nbytes == size == block.state_bytes(2, 41)  # does not grow


def test_one_streamed_segment_has_the_gradient_of_the_whole():
    block, x = build(), draw(2, 23, 24).requires_grad_()
    leaves = [x, *block.parameters()]
    weight = draw(2, 23, 24, seed=3)
    whole, streamed = block(x), block(x, state=block.init_state(2))
    a, b = (torch.autograd.grad((y * weight).sum(), leaves) for y in (whole, streamed))
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


@torch.no_grad()
def test_rows_at_different_lengths_and_reorder():
    block, x = build(), draw(3, 40, 24)
    state = block.init_state(3)
    block(x[:, :13], state=state)
    state.reset(torch.tensor([1]))
    block(x[:, 13:19], state=state)
    state.reorder(torch.tensor([2, 1, 2]))
    out = block(x[:, 19:], state=state)
    torch.testing.assert_close(out[1:2], block(x[1:2, 13:])[:, 6:], rtol=1e-9, atol=1e-9)
    went_on = block(torch.cat([x[2:3, :19], x[:1, 19:]], 1))[:, 19:]
    torch.testing.assert_close(out[:1], went_on, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_positions_rotate_only_the_window():
    block, x = build(window=3), draw(1, 20, 24)
    stretched = torch.arange(20)[None] * 3 + 7
    state = block.init_state(1)
    parts = [block(x[:, a:b], state=state, positions=stretched[:, a:b]) for a, b in ((0, 5), (5, 6), (6, 20))]
    torch.testing.assert_close(torch.cat(parts, 1), block(x, positions=stretched), rtol=1e-9, atol=1e-9)
    shifted = block(x, positions=torch.arange(20)[None] + 100)
    torch.testing.assert_close(shifted, block(x), rtol=1e-7, atol=1e-7)  # only distances count


def test_errors():
    with pytest.raises(ValueError, match="must divide num_heads"):
        create("window_global", 32, num_heads=3, num_kv_heads=2)
    with pytest.raises(ValueError, match="even"):
        create("window_global", 32, num_heads=2, head_dim=5)


@pytest.mark.parametrize("options", [*SIZES, {"num_globals": 0}, {"window": 9, "chunk_size": 3}])
@pytest.mark.parametrize("first", [1, 3, 8, 21])
def test_a_prefill_leaves_what_token_by_token_leaves(options, first):
    """The first segment is read at once, whatever its length; all that comes after cannot tell."""
    block, x = build(**options), draw(2, 30, 24)
    at_once, stepwise = block.init_state(2), block.init_state(2)
    whole = block(x[:, :first], state=at_once)
    steps = torch.cat([block(token, state=stepwise) for token in x[:, :first].split(1, 1)], 1)
    torch.testing.assert_close(whole, steps, rtol=1e-9, atol=1e-9)
    for name, mine in vars(at_once).items():
        theirs = getattr(stepwise, name)
        if isinstance(mine, torch.Tensor) and mine.is_floating_point():
            torch.testing.assert_close(mine.nan_to_num(), theirs.nan_to_num(), rtol=1e-9, atol=1e-9)
        else:
            assert torch.equal(torch.as_tensor(mine), torch.as_tensor(theirs)), name
    after = [block(x[:, first:], state=state) for state in (at_once, stepwise)]
    torch.testing.assert_close(*after, rtol=1e-9, atol=1e-9)
