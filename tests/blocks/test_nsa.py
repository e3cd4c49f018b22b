"""Native sparse attention against dense masks written from the paper's equations, and its degenerate cases."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from zoo.blocks.nsa import NativeSparseAttention
from zoo.registry import create

SMALL = {
    "num_heads": 4, "num_kv_heads": 2, "kernel_size": 4, "kernel_stride": 2, "block_size": 4, "top_k": 4, "window": 7,
}  # fmt: skip


def build(seed=0, dim=24, **options):
    torch.manual_seed(seed)
    block = create("nsa", dim, dtype=torch.float64, **{**SMALL, **options})
    for p in block.parameters():  # larger than at initialisation, so that attention is far from uniform
        nn.init.normal_(p, std=2 / p.shape[-1] ** 0.5)
    return block


def draw(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rotate(x, position, base=10000.0):
    """x [T, H, D] at positions [T]."""
    half = x.shape[-1] // 2
    angle = position[:, None, None] * base ** (-torch.arange(half, dtype=x.dtype) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def attend(q, k, v, mask):
    """Dense masked softmax: q [T, D], k [S, D], v [S, Dv], mask [T, S]; rows without a key give 0."""
    p = (q @ k.T * q.shape[-1] ** -0.5).masked_fill(~mask, float("-inf")).softmax(-1).nan_to_num(0.0)
    return p @ v, p


def read_in_full(weights, t, rule, num_blocks):
    """Blocks of token t from its weight on each window: the paper's double sum, by tokens shared in strides."""
    size, stride, block = rule.kernel_size, rule.kernel_stride, rule.block_size
    own, score = t // block, {}
    for j in range(own):
        shared = [
            len(set(range(c * stride, c * stride + size)) & set(range(j * block, (j + 1) * block))) // stride
            for c in range(len(weights))
        ]
        score[j] = sum(n * w for n, w in zip(shared, weights.tolist(), strict=True))
    always = {j for j in range(num_blocks) if j < rule.init_blocks or own - rule.local_blocks < j}
    always = {j for j in always if j <= own}
    rest = sorted((j for j in score if j not in always), key=lambda j: (-score[j], j))
    return always | set(rest[: rule.top_k - len(always)])


def oracle(block, x):
    """One row x [T, D]."""
    T, rule, Dk, Dv, G = len(x), block.rule, block.head_dim, block.v_head_dim, block.num_heads // block.num_kv_heads
    position, branches = torch.arange(T, dtype=x.dtype), block.kv_branches
    q = rotate((x @ block.q_proj.weight.T).unflatten(-1, (-1, Dk)), position)
    k = (x @ block.k_proj.weight.T).view(T, block.num_kv_heads, branches, Dk)
    v = (x @ block.v_proj.weight.T).view(T, block.num_kv_heads, branches, Dv)
    k, v = (h.expand(-1, -1, 3, -1).unbind(2) for h in (k, v))
    gates = torch.sigmoid(x @ block.g_proj.weight.T).view(T, -1, 3)
    starts = list(range(0, T - rule.kernel_size + 1, rule.kernel_stride))
    ends = torch.tensor([s + rule.kernel_size - 1 for s in starts], dtype=torch.int64)
    raw = rotate(k[0], position) if block.compress_k is None else k[0]
    kc, vc = (
        torch.stack([compress(mlp, h[s : s + rule.kernel_size]) for s in starts]) if starts else h[:0]
        for mlp, h in ((block.compress_k, raw), (block.compress_v, v[0]))
    )
    if block.compress_k is not None:
        kc = rotate(kc, ends.to(x.dtype))
    t, j = torch.arange(T)[:, None], torch.arange(T)
    out = torch.zeros(T, block.num_heads, Dv, dtype=x.dtype)
    for g in range(block.num_kv_heads):
        heads = range(g * G, (g + 1) * G)
        parts = {h: attend(q[:, h], kc[:, g], vc[:, g], ends <= t) for h in heads}
        weights = torch.stack([p for _, p in parts.values()]).sum(0)
        full = [read_in_full(weights[i], i, rule, -(-T // rule.block_size)) for i in range(T)]
        listed = torch.tensor([[n // rule.block_size in full[i] for n in range(T)] for i in range(T)])
        for h in heads:
            selected, _ = attend(q[:, h], rotate(k[1], position)[:, g], v[1][:, g], listed & (j <= t))
            window, _ = attend(q[:, h], rotate(k[2], position)[:, g], v[2][:, g], (j <= t) & (t - j < block.window))
            for n, o in enumerate((parts[h][0], selected, window)):
                out[:, h] += gates[:, h, n, None] * o
    return out.flatten(1) @ block.o_proj.weight.T


def compress(mlp, window):
    """One window [size, H, D] -> [H, D]."""
    if mlp is None:
        return window.mean(0)
    flat = (window + mlp.place[:, None]).transpose(0, 1).flatten(1)
    return F.silu(flat @ mlp.up_proj.weight.T) @ mlp.down_proj.weight.T


CASES = [
    {},
    {"compression": "mean", "shared_kv": True, "kernel_size": 4, "kernel_stride": 4, "top_k": 3},
    {"compression": "mean", "top_k": 3, "v_head_dim": 10},
    {"kernel_size": 8, "kernel_stride": 2, "block_size": 6, "top_k": 5, "init_blocks": 2},
    {"kernel_size": 3, "kernel_stride": 3, "block_size": 9, "top_k": 1, "init_blocks": 0, "local_blocks": 1},
    {"kernel_size": 2, "kernel_stride": 1, "block_size": 1, "top_k": 6, "local_blocks": 3},
]


@pytest.mark.parametrize("options", CASES)
@pytest.mark.parametrize("length", [1, 3, 30])
def test_equations(options, length):
    block, x = build(**options), draw(2, length, 24)
    expected = torch.stack([oracle(block, row) for row in x])
    torch.testing.assert_close(block(x), expected, rtol=1e-9, atol=1e-9)


def test_gradients():
    block, x = build(), draw(1, 26, 24).requires_grad_()
    weight, leaves = draw(1, 26, 24, seed=2), [x, *block.parameters()]
    ours = torch.autograd.grad((block(x) * weight).sum(), leaves)
    expected = torch.autograd.grad((oracle(block, x[0]) * weight[0]).sum(), leaves)
    torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-8)


def test_a_window_counts_by_the_strides_it_shares_with_a_block():
    # 32, 16, 64: block j gets windows 4j-1 .. 4j+3 with weights 1, 2, 2, 2, 1
    rule = build(dim=24, kernel_size=32, kernel_stride=16, block_size=64).rule
    slots = torch.arange(12)[None, None, None]
    shares = rule._pool(torch.eye(12)[None, None], slots)[0, 0]
    assert shares[:, 1].tolist() == [0, 0, 0, 1, 2, 2, 2, 1, 0, 0, 0, 0]


class Gates(nn.Module):
    """In place of g_proj: sigmoid of +-1000 is exactly 1 or 0."""

    def __init__(self, heads, on):
        super().__init__()
        self.logits = torch.tensor([1000.0 if n == on else -1000.0 for n in range(3)], dtype=torch.float64).repeat(
            heads
        )

    def forward(self, x):
        return self.logits.expand(*x.shape[:-1], -1)


@pytest.mark.parametrize(
    "branch,options", [(1, {"top_k": 99}), (2, {"window": 40}), (0, {"kernel_size": 1, "kernel_stride": 1})]
)
def test_each_branch_alone_can_be_attention(branch, options):
    block, x = build(shared_kv=True, compression="mean", **options), draw(2, 40, 24)
    dense = create("attention", 24, num_heads=4, num_kv_heads=2, dtype=torch.float64)
    dense.load_state_dict({n: p for n, p in block.state_dict().items() if n != "g_proj.weight"})
    block.g_proj = Gates(4, branch)
    torch.testing.assert_close(block(x), dense(x), rtol=1e-10, atol=1e-10)


def test_no_complete_window_gives_zero():
    block, x = build(kernel_size=8, kernel_stride=4), draw(1, 12, 24)
    block.g_proj = Gates(4, on=0)
    y = block(x)
    assert (y[:, :7] == 0).all() and (y[:, 7:] != 0).all()


def test_lists_are_sorted_unique_and_hold_what_is_forced():
    block, x = build(top_k=4), draw(2, 50, 24)
    q, k, _, _ = block._project(x, torch.arange(50).expand(2, 50))
    index, start = torch.arange(50).expand(2, 50), block.rule.starts(50, None, x)
    kc = block.rule.gather(k[0], start).mean(2)
    idx = block.rule.select(q, kc, torch.where(start >= 0, start + 3, -1), index, 50).idx
    assert idx.shape == (2, 2, 50, 4)  # one list a group
    for row in idx.flatten(0, 1):
        for t, ids in enumerate(row.tolist()):
            real = [i for i in ids if i >= 0]
            assert real == sorted(set(real)) == ids[: len(real)]
            assert {0, t // 4, max(t // 4 - 1, 0)} <= set(real) and max(real) == t // 4
            assert len(real) == min(4, t // 4 + 1)


def test_the_future_changes_nothing():
    block, x = build(), draw(1, 33, 24)
    for t in (1, 3, 4, 13, 32):
        other = x.clone()
        other[:, t:] = draw(1, 33 - t, 24, seed=t)
        torch.testing.assert_close(block(x)[:, :t], block(other)[:, :t], rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", CASES[:4])
def test_packed_documents_are_as_if_alone(options):
    block, x = build(**options), draw(1, 52, 24).requires_grad_()
    lengths = [1, 9, 3, 4, 14, 21]
    ids = torch.cat([torch.full((n,), 10 - i) for i, n in enumerate(lengths)])[None]
    weight, leaves = draw(1, 52, 24, seed=3), [x, *block.parameters()]
    packed = block(x, doc_ids=ids)
    alone = torch.cat([block(part) for part in x.split(lengths, 1)], 1)
    torch.testing.assert_close(packed, alone, rtol=1e-10, atol=1e-10)
    together, apart = (torch.autograd.grad((y * weight).sum(), leaves) for y in (packed, alone))
    torch.testing.assert_close(together, apart, rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("max_len", [None, 100])
@pytest.mark.parametrize("cut", [[1] * 100, [100], [37, 1, 1, 10, 4, 47], [3] * 33 + [1]])
@pytest.mark.parametrize("options", CASES[:4])
def test_segments(options, cut, max_len):
    block, x = build(**options), draw(2, 100, 24)
    state = block.init_state(2, max_len)
    parts = [block(part, state=state) for part in x.split(cut, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), block(x), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_rows_at_different_lengths():
    block, x = build(), draw(3, 40, 24)
    state = block.init_state(3, 64)
    block(x[:, :13], state=state)
    state.reset(torch.tensor([1]))
    state.reorder(torch.tensor([2, 1, 2]))
    out = block(x[:, 13:], state=state)
    torch.testing.assert_close(out[1:2], block(x[1:2, 13:]), rtol=1e-9, atol=1e-9)
    went_on = block(torch.cat([x[2:3, :13], x[:1, 13:]], 1))[:, 13:]
    torch.testing.assert_close(out[:1], went_on, rtol=1e-9, atol=1e-9)


def test_errors():
    with pytest.raises(ValueError, match="must divide kernel_size"):
        NativeSparseAttention(32, kernel_stride=12)
    with pytest.raises(ValueError, match="raise top_k"):
        NativeSparseAttention(32, top_k=2)
    with pytest.raises(ValueError, match="even"):
        NativeSparseAttention(32, num_heads=2, head_dim=5)
