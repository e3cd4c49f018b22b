"""InfLLM-V2 against a dense mask written from its equations, and its switch to dense attention."""

import pytest
import torch

from zoo.blocks.infllm_v2 import InfLLMV2
from zoo.registry import create

SMALL = {
    "num_heads": 4, "num_kv_heads": 2, "kernel_size": 4, "kernel_stride": 2, "block_size": 4, "window": 8,
    "top_k": 4, "dense_len": 0,
}  # fmt: skip


def build(seed=0, dim=24, **options):
    torch.manual_seed(seed)
    block = create("infllm_v2", dim, dtype=torch.float64, **{**SMALL, **options})
    for p in block.parameters():  # larger than at initialisation, so that attention is far from uniform
        torch.nn.init.normal_(p, std=2 / dim**0.5)
    return block


def draw(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rotate(x, base=10000.0):
    """x [T, H, D] at positions 0 .. T-1."""
    half, position = x.shape[-1] // 2, torch.arange(len(x), dtype=x.dtype)[:, None, None]
    angle = position * base ** (-torch.arange(half, dtype=x.dtype) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def oracle(block, x):
    """One row x [T, D], token by token and group by group."""
    T, D, rule, G = len(x), block.head_dim, block.rule, block.num_heads // block.num_kv_heads
    q, k, v = ((x @ p.weight.T).unflatten(-1, (-1, D)) for p in (block.q_proj, block.k_proj, block.v_proj))
    q, k, size = rotate(q), rotate(k), rule.block_size
    out = torch.zeros_like(q)
    for t in range(T):
        own = t // size
        starts = [s for s in range(0, t + 1, rule.kernel_stride) if s + rule.kernel_size - 1 <= t]
        for g in range(block.num_kv_heads):
            heads, weight = slice(g * G, (g + 1) * G), []
            if starts:
                kc = torch.stack([k[s : s + rule.kernel_size, g].mean(0) for s in starts])
                weight = (q[t, heads] @ kc.T / D**0.5).softmax(-1).sum(0).tolist()
            score = [0.0] * own
            for j in range(own):
                touching = (
                    w for s, w in zip(starts, weight, strict=True) if j * size - rule.kernel_size < s < (j + 1) * size
                )
                score[j] = max(touching, default=0.0)
            read = {j for j in range(own + 1) if j < rule.init_blocks or j > own - rule.local_blocks}
            rest = sorted((j for j in range(own) if j not in read), key=lambda j: (-score[j], j))
            read |= set(rest[: rule.top_k - len(read)])
            seen = [i for i in range(t + 1) if t < block.dense_len or i // size in read]
            p = (q[t, heads] @ k[seen, g].T / D**0.5).softmax(-1)
            out[t, heads] = p @ v[seen, g]
    return out.flatten(1) @ block.o_proj.weight.T


CASES = [
    {},
    {"dense_len": 21},
    {"dense_len": 10, "local_extra": True, "top_k": 3},
    {"kernel_size": 6, "block_size": 6, "window": 6, "init_blocks": 2},
    {"kernel_size": 8, "kernel_stride": 4, "init_blocks": 0, "window": 4, "top_k": 1},
]


@pytest.mark.parametrize("options", CASES)
@pytest.mark.parametrize("length", [1, 5, 33])
def test_equations(options, length):
    block, x = build(**options), draw(2, length, 24)
    expected = torch.stack([oracle(block, row) for row in x])
    torch.testing.assert_close(block(x), expected, rtol=1e-9, atol=1e-9)


def test_windows_of_one_token_choose_the_heaviest_tokens():
    block, x = build(kernel_size=1, kernel_stride=1, block_size=1, window=1, init_blocks=0, top_k=5), draw(1, 20, 24)
    torch.testing.assert_close(block(x)[0], oracle(block, x[0]), rtol=1e-9, atol=1e-9)
    q, k = (rotate((x[0] @ p.weight.T).unflatten(-1, (-1, 6))) for p in (block.q_proj, block.k_proj))
    index = torch.arange(20)[None]
    idx = block.rule.select(q[None], k[None], index, index, 20).idx
    weight = (q[19, :2] @ k[:, 0].T / 6**0.5).softmax(-1).sum(0)[:19]
    assert set(idx[0, 0, 19].tolist()) == {19, *weight.topk(4).indices.tolist()}


def test_a_block_is_scored_by_the_windows_that_touch_it():
    # 32, 16, 64: block j is touched by windows 4j-1 .. 4j+3
    rule = build(kernel_size=32, kernel_stride=16, block_size=64, window=64).rule
    touches = rule._pool(torch.eye(12)[None, None], torch.arange(12)[None, None, None])[0, 0]
    assert touches[:, 1].nonzero().flatten().tolist() == [3, 4, 5, 6, 7]


def test_dense_up_to_dense_len():
    block, x = build(dense_len=30), draw(2, 45, 24)
    dense = create("attention", 24, num_heads=4, num_kv_heads=2, dtype=torch.float64)
    dense.load_state_dict(block.state_dict())
    assert torch.equal(block(x[:, :30]), dense(x[:, :30]))
    torch.testing.assert_close(block(x)[:, :30], dense(x)[:, :30], rtol=1e-10, atol=1e-10)
    assert (block(x)[:, 35:] - dense(x)[:, 35:]).abs().max() > 1e-3


@pytest.mark.parametrize("options", CASES[:3])
def test_packed_documents_are_as_if_alone(options):
    block, x = build(**options), draw(1, 64, 24).requires_grad_()
    lengths = [1, 9, 3, 4, 26, 21]
    ids = torch.cat([torch.full((n,), 10 - i) for i, n in enumerate(lengths)])[None]
    weight, leaves = draw(1, 64, 24, seed=3), [x, *block.parameters()]
    packed = block(x, doc_ids=ids)
    alone = torch.cat([block(part) for part in x.split(lengths, 1)], 1)
    torch.testing.assert_close(packed, alone, rtol=1e-10, atol=1e-10)
    together, apart = (torch.autograd.grad((y * weight).sum(), leaves) for y in (packed, alone))
    torch.testing.assert_close(together, apart, rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("max_len", [None, 100])
@pytest.mark.parametrize("cut", [[1] * 100, [100], [37, 1, 1, 10, 4, 47]])
@pytest.mark.parametrize("options", CASES[:3])
def test_segments(options, cut, max_len):
    block, x = build(**options), draw(2, 100, 24)
    state = block.init_state(2, max_len)
    parts = [block(part, state=state) for part in x.split(cut, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), block(x), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_rows_at_different_lengths():
    block, x = build(dense_len=14), draw(3, 40, 24)
    state = block.init_state(3, 64)
    block(x[:, :13], state=state)
    state.reset(torch.tensor([1]))
    state.reorder(torch.tensor([2, 1, 2]))
    out = block(x[:, 13:], state=state)
    torch.testing.assert_close(out[1:2], block(x[1:2, 13:]), rtol=1e-9, atol=1e-9)
    went_on = block(torch.cat([x[2:3, :13], x[:1, 13:]], 1))[:, 13:]
    torch.testing.assert_close(out[:1], went_on, rtol=1e-9, atol=1e-9)


def test_errors():
    with pytest.raises(ValueError, match="multiple of block_size"):
        InfLLMV2(32, window=100)
    with pytest.raises(ValueError, match="must divide kernel_size"):
        InfLLMV2(32, kernel_stride=12)
    with pytest.raises(ValueError, match="raise top_k"):
        InfLLMV2(32, top_k=2)
