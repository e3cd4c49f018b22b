"""Prefix language modelling and Block-Attention against explicit masks, and states of passages that are joined."""

import pytest
import torch

import zoo
from zoo.blocks.block_attention import join, one_passage

DIM, T, HEADS, GROUPS, D = 32, 37, 4, 2, 8


def build(name, seed=1, **options):
    options = {"num_heads": HEADS, "num_kv_heads": GROUPS, **options}
    block = zoo.create_block(name, DIM, dtype=torch.float64, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in block.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * (2 / p.shape[-1] ** 0.5))
    return block


def draw(*shape, seed=2):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rotate(x, base=10000.0):
    """x [T, H, D] at 0 .. T - 1."""
    half = x.shape[-1] // 2
    angle = torch.arange(len(x))[:, None, None] * base ** (-torch.arange(half, dtype=x.dtype) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def masked(block, x, seen):
    """Softmax attention of one row x [T, DIM] under the mask seen [T, T]."""
    q, k, v = ((x @ p.weight.T).unflatten(-1, (-1, D)) for p in (block.q_proj, block.k_proj, block.v_proj))
    k, v = (y.repeat_interleave(HEADS // GROUPS, 1) for y in (rotate(k), v))
    scores = torch.einsum("thd,jhd->htj", rotate(q), k) / D**0.5
    p = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("htj,jhd->thd", p, v).flatten(1) @ block.o_proj.weight.T


def prefix(n):
    return torch.tensor([[j <= t or (j < n and t < n) for j in range(T)] for t in range(T)])


def passages(size, count):
    return torch.tensor(
        [[j <= t and (t >= size * count or j // size == t // size) for j in range(T)] for t in range(T)]
    )


CASES = [
    ("prefix_lm", {"prefix_len": 9}, prefix(9)),
    ("prefix_lm", {"prefix_len": 1}, prefix(1)),
    ("prefix_lm", {"prefix_len": 99}, prefix(99)),
    ("block_attention", {"block_size": 7, "num_blocks": 3}, passages(7, 3)),
    ("block_attention", {"block_size": 5, "num_blocks": 99}, passages(5, 99)),
]


@torch.no_grad()
@pytest.mark.parametrize("name, options, seen", CASES)
def test_mask(name, options, seen):
    block, x = build(name, **options), draw(2, T, DIM)
    expected = torch.stack([masked(block, row, seen) for row in x])
    torch.testing.assert_close(block(x), expected, rtol=1e-9, atol=1e-9)
    for cut in ([12, 1, 1, 20, 3], [T]) if "prefix_len" in options else ([1] * T, [3, 9, 25]):
        if options.get("prefix_len", 0) > cut[0]:
            continue
        state = block.init_state(2, T)
        y = torch.cat([block(part, state=state) for part in x.split(cut, 1)], 1)
        torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)


def test_a_prefix_is_what_the_first_segment_holds_of_it():
    block, x = build("prefix_lm", prefix_len=20), draw(1, T, DIM)
    state = block.init_state(1)
    y = torch.cat([block(part, state=state) for part in x.split([12, 8, 17], 1)], 1)
    seen = prefix(20)
    seen[:12, 12:] = False
    torch.testing.assert_close(y[0], masked(block, x[0], seen), rtol=1e-9, atol=1e-9)


def test_a_causal_model_refuses_a_prefix(tmp_path):
    path = tmp_path / "prefix.yaml"
    path.write_text("dim: 64\nvocab_size: 9\ntrunk: [prefix_lm]\n")
    with pytest.raises(zoo.ConfigError, match="looks at later tokens"):
        zoo.build(path)


@torch.no_grad()
def test_passages_that_were_read_apart():
    block, x = build("block_attention", block_size=8, num_blocks=3), draw(2, T, DIM)
    whole = block(x)
    states = [one_passage(block.init_state(2)) for _ in range(3)]
    for i, state in enumerate(states):
        block(x[:, 8 * i : 8 * i + 8], state=state)
    joined = join(states)
    got = torch.cat([block(part, state=joined) for part in x[:, 24:].split([1, 12], 1)], 1)
    torch.testing.assert_close(got, whole[:, 24:], rtol=1e-9, atol=1e-9)
    assert all(s.cache.size == 8 for s in states)  # can be joined again, in another order
    other = block(torch.cat([x[:, 8:16], x[:, :8], x[:, 16:]], 1))
    again = block(x[:, 24:], state=join([states[1], states[0], states[2]]))
    torch.testing.assert_close(again, other[:, 24:], rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_passages_of_any_length_row_by_row():
    block, x = build("block_attention", block_size=8), draw(2, T, DIM)
    states = [one_passage(block.init_state(2)) for _ in range(2)]
    block(x[:, :5], state=states[0])
    for row, n in ((0, 11), (1, 3)):
        part = states[1].rows(torch.tensor([row]))
        block(x[row : row + 1, 5 : 5 + n], state=part)
        states[1].put_rows(torch.tensor([row]), part)
    joined = join(states)
    assert joined.cache.length.tolist() == [16, 8]
    y = block(x[:, 20:], state=joined)
    for row, n in ((0, 11), (1, 3)):
        tokens = torch.cat([x[row, : 5 + n], x[row, 20:]])
        m = len(tokens)
        place = torch.arange(m)
        seen = place <= place[:, None]
        seen[5 : 5 + n, :5] = False
        torch.testing.assert_close(y[row], masked(block, tokens, seen)[5 + n :], rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_a_whole_model_reads_passages_once():
    model = zoo.build("block_attention_small", ["dim=64", "define.layer[0].block_attention.block_size=6"]).double()
    tokens = torch.randint(512, (2, 31), generator=torch.Generator().manual_seed(0))
    states = [one_passage(model.init_state(2)) for _ in range(4)]
    for i, state in enumerate(states):
        model(tokens[:, 6 * i : 6 * i + 6], state)
    got = model(tokens[:, 24:], join(states))
    torch.testing.assert_close(got, model(tokens)[:, 24:], rtol=1e-8, atol=1e-8)
    with pytest.raises(ValueError, match="depends on what came before"):
        join([zoo.build("mamba2_130m", ["dim=64", "trunk[0].repeat=1"]).init_state(1)] * 2)
