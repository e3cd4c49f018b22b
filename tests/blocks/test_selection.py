"""Selection policies of attention against their equations: which tokens each query reads, head by head."""

import pytest
import torch

import zoo
from zoo.blocks.selection import complete_blocks, running_sum, true_ids

DIM, T, HEADS, GROUPS, D = 32, 45, 4, 2, 8


def build(select, seed=1, **options):
    options = {"num_heads": HEADS, "num_kv_heads": GROUPS, "rope": False, **options}
    block = zoo.create_block("attention", DIM, dtype=torch.float64, select=select, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in block.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * (2 / p.shape[-1] ** 0.5))
    return block


def draw(*shape, seed=2):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def projected(block, x):
    """q, k, v [T, HEADS, D] of one row, keys and values once for each query head."""
    q, k, v = ((x @ p.weight.T).unflatten(-1, (-1, D)) for p in (block.q_proj, block.k_proj, block.v_proj))
    return q, *(y.repeat_interleave(HEADS // GROUPS, 1) for y in (k, v))


def oracle(block, x, reads):
    """Softmax attention of one row x [T, DIM] to the tokens reads(q, k, t, h), q and k of that head."""
    q, k, v = projected(block, x)
    out = torch.zeros_like(q)
    for h in range(HEADS):
        for t in range(len(x)):
            seen = sorted(j for j in reads(q[:, h], k[:, h], t, h) if j <= t)
            assert t in seen
            out[t, h] = (k[seen, h] @ q[t, h] * (block.scale or D**-0.5)).softmax(0) @ v[seen, h]
    return out.flatten(1) @ block.o_proj.weight.T


@torch.no_grad()
def check(select, reads, **options):
    block, x = build(select, **options), draw(2, T, DIM)
    expected = torch.stack([oracle(block, row, reads) for row in x])
    torch.testing.assert_close(block(x), expected, rtol=1e-9, atol=1e-9)
    dense = build(None, **options)
    assert (dense(x) - expected).abs().max() > 1e-2  # something was left out


def span(blocks, size):
    return {b * size + i for b in blocks for i in range(size)}


def best(score, n):
    """The n of largest score, ties to the first."""
    return sorted(range(len(score)), key=lambda i: (-score[i].item(), i))[:n]


def bound(q, keys):
    """The largest score of any key in the box of `keys`: in each channel one of its two ends."""
    return torch.maximum(q * keys.amax(0), q * keys.amin(0)).sum()


def as_tensor(values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("size, top_k", [(4, 3), (8, 1), (1, 5)])
def test_quest(size, top_k):
    def reads(q, k, t, h):
        pages = [bound(q[t], k[p * size : (p + 1) * size]) for p in range(t // size)]
        return span([*best(as_tensor(pages), top_k - 1), t // size], size)

    check({"quest": {"block_size": size, "top_k": top_k}}, reads)


def test_quest_with_pages_of_one_token_takes_the_largest_scores():
    def reads(q, k, t, h):
        return [*best(k[:t] @ q[t], 4), t]

    check({"quest": {"block_size": 1, "top_k": 5}}, reads)


@pytest.mark.parametrize("streaming", [None, [0], [0, 1], []])
def test_lserve(streaming):
    size, page, top_k, sinks, window = 8, 4, 3, 8, 16

    def reads(q, k, t, h):
        own = t // size
        if h // 2 in ([1] if streaming is None else streaming):
            return {j for j in range(t + 1) if j < sinks or j // size > own - window // size}
        pages = [max(bound(q[t], k[s : s + page]) for s in range(p * size, (p + 1) * size, page)) for p in range(own)]
        return span([*best(as_tensor(pages), top_k - 1), own], size)

    options = {"block_size": size, "page_size": page, "top_k": top_k, "sinks": sinks, "window": window}
    check({"lserve": {**options, "streaming_heads": streaming}}, reads)


def greedy(mass, first, tau):
    """The blocks of `first`, then the heaviest, each kept while those before hold less than tau of all."""
    order = [*first, *(b for b in best(mass, len(mass)) if b not in first)]
    kept, held = set(first), sum(mass[b] for b in first)
    for b in order[len(first) :]:
        if held >= tau * mass.sum():
            break
        kept.add(b)
        held += mass[b]
    return kept


def antidiagonals(q, k, S, scale):
    """A_ij of groups of S tokens, from the sums over the antidiagonals of the S x S cells of q k^T."""
    n = len(q) // S * S
    cells = (q[:n] @ k[:n].T).unfold(0, S, S).unfold(1, S, S)  # [groups, groups, S, S]
    logits = cells.flip(-1).diagonal(dim1=-2, dim2=-1).sum(-1) * scale / S
    return logits.masked_fill(torch.ones_like(logits).triu(1).bool(), float("-inf")).softmax(-1)


@pytest.mark.parametrize("size, stride, tau, scale", [(8, 4, 0.8, None), (8, 8, 0.6, 0.2), (4, 1, 0.7, None)])
def test_xattention(size, stride, tau, scale):
    def reads(q, k, t, h):
        own, done = t // size, (t + 1) // stride
        if not done:
            return span([own], size)
        A = antidiagonals(q[: t + 1], k[: t + 1], stride, scale or D**-0.5)
        block = (done - 1) * stride // size  # whose groups count
        rows = A[block * size // stride : done].sum(0)
        mass = as_tensor([rows[b * size // stride : (b + 1) * size // stride].sum() for b in range(own + 1)])
        return span(greedy(mass, sorted({0, own}), tau), size)

    check({"xattention": {"block_size": size, "stride": stride, "tau": tau}}, reads, scale=scale)


@torch.no_grad()
def test_xattention_decides_at_the_end_of_a_block_as_the_paper_does():
    """All groups of the block's queries, and for a stride of 1 the true attention that the blocks receive."""
    block, x = build({"xattention": {"block_size": 8, "stride": 1, "tau": 0.5}}), draw(1, 40, DIM)
    q, k, _ = projected(block, x[0])
    t, h = 31, 1
    p = (q[:32, h] @ k[:32, h].T / D**0.5).masked_fill(~torch.ones(32, 32).tril().bool(), float("-inf")).softmax(-1)
    mass = p[24:].sum(0).unflatten(0, (4, 8)).sum(-1)
    kept = greedy(mass, [0, 3], 0.5)
    seen = sorted(span(kept, 8))
    v = projected(block, x[0])[2]
    expected = (q[t, h] @ k[seen, h].T / D**0.5).softmax(0) @ v[seen, h]
    block.o_proj.weight.data.copy_(torch.eye(DIM))
    torch.testing.assert_close(block(x)[0, t].unflatten(0, (HEADS, D))[h], expected, rtol=1e-9, atol=1e-9)
    assert len(kept) < 4


@pytest.mark.parametrize("size, segment, tau", [(4, 16, 0.6), (4, 4, 0.5), (8, 16, 0.3)])
def test_pbs(size, segment, tau):
    def reads(q, k, t, h):
        seen = set(range(t // segment * segment, t + 1))
        blocks = []
        for g in range(t // segment):
            tokens = list(range(g * segment, (g + 1) * segment))
            total = torch.zeros(segment, dtype=q.dtype)
            for i in tokens[-size:]:
                total[: i - tokens[0] + 1] += (k[tokens[0] : i + 1] @ q[i] * D**-0.5).softmax(0)
            order = [tokens[0] + j for j in best(total, segment)]
            blocks += [order[i : i + size] for i in range(0, segment, size)]
        if blocks:
            mean = q[t // size * size : t + 1].mean(0)
            p = torch.stack([k[b].mean(0) @ mean for b in blocks]).mul(D**-0.5).softmax(0)
            kept, held = [], 0.0
            for b in best(p, len(p)):
                if held >= tau:
                    break
                kept.append(b)
                held += p[b].item()
            kept += [b for b in range(len(blocks)) if 0 in blocks[b]]
            seen |= {j for b in kept for j in blocks[b]}
        return seen

    check({"pbs": {"block_size": size, "segment_size": segment, "tau": tau}}, reads)


@pytest.mark.parametrize("size, step, init, theta", [(4, 2, 3, 0.0), (3, 3, 1, -0.5), (8, 1, 8, 1.0)])
def test_anchor(size, step, init, theta):
    def reads(q, k, t, h):
        above = t // (size * step) * size * step  # start of the super-block
        done = (t + 1) // size  # complete rows
        seen = {j for j in range(t + 1) if j < init or j >= above}
        if not done:
            return seen
        rows = range((done - 1) // step * step, done)
        for r in rows:
            tokens = range(r * size, (r + 1) * size)
            own = r // step * size * step
            near = [[j for j in range(i + 1) if j < init or j >= own] for i in tokens]
            anchor = torch.stack([(k[js] @ q[i]).max() for i, js in zip(tokens, near, strict=True)]).mean() * D**-0.5
            mean = q[r * size : (r + 1) * size].mean(0)
            seen |= {j for j in range(init, above) if k[j] @ mean * D**-0.5 + theta >= anchor}
        return seen

    check({"anchor": {"block_size": size, "step": step, "init": init, "theta": theta}}, reads)


@torch.no_grad()
def test_anchor_does_not_see_a_shift_of_all_scores():
    """A vector added to all keys adds the same number to all scores of a query."""
    block, x = build({"anchor": {"block_size": 4, "step": 2, "init": 2, "theta": 0.3}}, bias=True), draw(1, T, DIM)
    y = block(x)
    block.k_proj.bias += draw(*block.k_proj.bias.shape)
    torch.testing.assert_close(block(x), y, rtol=1e-9, atol=1e-9)


POLICIES = [
    {"anchor": {"block_size": 4, "step": 2, "init": 3, "theta": 0.0}},
    {"quest": {"block_size": 4, "top_k": 3}},
    {"lserve": {"block_size": 8, "page_size": 4, "top_k": 2, "sinks": 8, "window": 8}},
    {"xattention": {"block_size": 8, "stride": 4, "tau": 0.7}},
    {"pbs": {"block_size": 4, "segment_size": 8, "tau": 0.5}},
]


@pytest.mark.parametrize("select", POLICIES, ids=lambda s: next(iter(s)))
def test_long_sequences_are_done_in_parts(select, monkeypatch):
    block, x = build(select, rope=True, qk_norm="head", output_gate=True), draw(2, T, DIM).requires_grad_()
    ids = torch.arange(T).ge(14).long() + torch.arange(T).ge(15)
    for given in ({}, {"doc_ids": ids.expand(2, T)}):
        whole = block(x, **given)
        expected = torch.autograd.grad(whole.square().sum(), [x, *block.parameters()])
        with monkeypatch.context() as patch:
            patch.setattr("zoo.blocks.selection.SCORES_AT_ONCE", 2 * HEADS * T * 7)
            parts = block(x, **given)
        torch.testing.assert_close(parts, whole, rtol=1e-10, atol=1e-10)
        got = torch.autograd.grad(parts.square().sum(), [x, *block.parameters()])
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_more_is_read_where_more_is_allowed():
    x = draw(1, T, DIM)
    dense = build(None)(x)
    for name, option, values in (
        ("quest", "top_k", (2, 6, 9)), ("xattention", "tau", (0.3, 0.9, 0.99)), ("pbs", "tau", (0.3, 0.9, 0.99)),
    ):  # fmt: skip
        size = {"block_size": 4} if name == "quest" else {"block_size": 4, "stride": 2}
        size = {"block_size": 4, "segment_size": 8} if name == "pbs" else size
        errors = [(build({name: {**size, option: v}})(x) - dense).square().mean().item() for v in values]
        assert errors[0] > errors[1] > errors[2]


def test_running_sum_does_not_depend_on_the_cut():
    x, offset = draw(1, 40, 3), torch.arange(40)[None] % 7
    whole = running_sum(x, offset, 7)
    assert torch.equal(running_sum(x[:, 13:], offset[:, 13:], 7)[:, 6:], whole[:, 19:])
    torch.testing.assert_close(whole[0, 20], x[0, 14:21].sum(0))


def test_complete_blocks_of_documents():
    place = torch.tensor([[0, 1, 2, 3, 4, 0, 0, 1, 2, 3, 4, 5]])
    ids = torch.tensor([[0, 0, 0, 0, 0, 1, 2, 2, 2, 2, 2, 2]])
    assert complete_blocks(place, 2, ids).tolist() == [[0, 2, -1, 6, 8, 10]]
    assert complete_blocks(torch.arange(7)[None], 3).tolist() == [[0, 3, -1]]


def test_ids_of_a_mask():
    mask = torch.rand(3, 5, 9, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[0, 0], mask[0, 1] = False, True
    for row, ids in zip(mask.flatten(0, 1), true_ids(mask).flatten(0, 1), strict=True):
        found = row.nonzero().flatten().tolist()
        assert ids.tolist() == found + [-1] * (9 - len(found))


def test_errors():
    for select, words in (
        ("quets", "did you mean quest"),
        ({"quest": {"topk": 3}}, "did you mean top_k"),
        ({"quest": {"top_k": 0}}, "at least 1"),
        ({"xattention": {"stride": 7}}, "must divide block_size"),
        ({"pbs": {"segment_size": 100}}, "must divide segment_size"),
        ({"lserve": {"window": 100}}, "multiples of block_size"),
        ({"lserve": {"streaming_heads": [2]}}, "there are 2 key heads"),
    ):
        with pytest.raises(ValueError, match=words):
            build(select)
    with pytest.raises(ValueError, match="does not go with window"):
        build("quest", window=8)
    with pytest.raises(ValueError, match="given to attention as select: quest"):
        zoo.create_block("quest", 64)


def test_a_mistake_in_yaml_is_shown_with_its_place(tmp_path):
    path = tmp_path / "wrong.yaml"
    path.write_text("dim: 64\nvocab_size: 9\ntrunk:\n  - attention: {select: {quest: {topk: 3}}}\n")
    with pytest.raises(zoo.ConfigError, match=r"wrong.yaml:4:\d+ trunk\[0\].attention: .*did you mean top_k"):
        zoo.build(path)


def test_keys_that_calls_share_are_refused(tmp_path):
    path = tmp_path / "shared.yaml"
    loop = "{loop: {steps: 2, kv: first}, of: {attention: {select: quest}}}"
    path.write_text(f"dim: 64\nvocab_size: 9\ntrunk: [{loop}]\n")
    with pytest.raises(zoo.ConfigError, match="attention with select: reads its own keys only"):
        zoo.build(path)
