"""The prefix tree against the plain cache, and what it holds of rows that begin alike."""

import copy
import random

import pytest
import torch

import zoo
from zoo.blocks import prefix_tree
from zoo.blocks.prefix_tree import Page, PagePool, PrefixState, plan

DIM, HEADS, GROUPS, D = 32, 4, 2, 8


def build(chunk_size=4, seed=1, dtype=torch.float64, **options):
    """A block with the prefix tree and the same block with the plain cache."""
    blocks = []
    for cache in ({"prefix_tree": {"chunk_size": chunk_size}}, None):
        given = {"num_heads": HEADS, "num_kv_heads": GROUPS, **({} if cache is None else {"cache": cache}), **options}
        blocks.append(zoo.create_block("attention", DIM, dtype=dtype, **given))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in blocks[0].parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * (2 / p.shape[-1] ** 0.5))
    blocks[1].load_state_dict(blocks[0].state_dict())
    return blocks


def draw(*shape, seed=2, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def together(x, prefix, rows):
    """x [rows, T, D] of which the first `prefix` tokens are those of row 0."""
    return torch.cat([x[:1, :prefix].expand(rows, -1, -1), x[:rows, prefix:]], 1)


def contents(state, b):
    """Keys and values that row b holds."""
    pages, open_ = state.held[b]
    at = [page.slot for page in pages]
    parts = ((state.pool.k, state.k), (state.pool.v, state.v))
    return [torch.cat([pool[at].flatten(0, 1), tail[b, :open_]]) for pool, tail in parts]


def agree(state, plain):
    """Bit for bit the plain cache, and no page is in use that nobody holds."""
    assert state.length.tolist() == plain.length.tolist()
    for b, n in enumerate(plain.length.tolist()):
        k, v = contents(state, b)
        assert torch.equal(k, plain.k[b, :n]) and torch.equal(v, plain.v[b, :n])


def pages_of(*states):
    return {page for state in states for row in state.held for page in row.pages}


class History:
    """The same random actions on the prefix tree and on the plain cache."""

    def __init__(self, rng, seed):
        self.rng, self.alphabet = rng, draw(3, DIM, seed=seed)
        self.blocks = build(chunk_size=rng.choice((1, 2, 3)), seed=seed)
        self.rows, max_len = rng.randint(2, 5), rng.choice((None, 400))
        self.pair = [block.init_state(self.rows, max_len) for block in self.blocks]
        self.kept = None

    def feed(self, pair, rows, most):
        # three different tokens, and often the same in all rows, so that rows meet and part all the time
        n, same = self.rng.randint(1, most), self.rng.random() < 0.6
        words = [[self.rng.randrange(3) for _ in range(n)] for _ in range(rows)]
        x = torch.stack([self.alphabet[words[0 if same else b]] for b in range(rows)])
        close(*(block(x, state=state) for block, state in zip(self.blocks, pair, strict=True)))
        agree(*pair)

    def segment(self):
        self.feed(self.pair, self.rows, 9)

    def token(self):
        self.feed(self.pair, self.rows, 1)

    def reorder(self):
        at = torch.tensor([self.rng.randrange(self.rows) for _ in range(self.rng.randint(2, 5))])
        self.rows = len(at)
        for state in self.pair:
            state.reorder(at)

    def reset(self):
        at = torch.tensor([self.rng.randrange(self.rows)])
        for state in self.pair:
            state.reset(at)

    def part(self):
        at = torch.tensor(self.rng.sample(range(self.rows), self.rng.randint(1, self.rows)))
        parts = [state.rows(at) for state in self.pair]
        self.feed(parts, len(at), 7)
        for state, part in zip(self.pair, parts, strict=True):
            state.put_rows(at, part)

    def clone(self):
        self.feed([state.clone() for state in self.pair], self.rows, 7)

    def keep(self):
        self.kept = ([state.snapshot() for state in self.pair], self.rows)

    def back(self):
        if self.kept is not None:
            self.rows = self.kept[1]
            for state, snapshot in zip(self.pair, self.kept[0], strict=True):
                state.restore(snapshot)


@torch.no_grad()
@pytest.mark.parametrize("seed", range(12))
def test_any_history_is_that_of_the_plain_cache(seed, monkeypatch):
    rng = random.Random(seed)
    monkeypatch.setattr(prefix_tree, "WORTH_A_CALL", rng.choice((1, 6, 128)))
    history = History(rng, seed)
    for _ in range(45):
        action = rng.choice(("segment", "segment", "token", "reorder", "reset", "part", "clone", "keep", "back"))
        getattr(history, action)()
        agree(*history.pair)
        live = history.pair[:1] + ([] if history.kept is None else history.kept[0][:1])
        assert len(live[0].pool) == len(pages_of(*live))
    state, history.kept, live = history.pair[0], None, []
    state.reset()
    assert len(state.pool) == 0 and not state.pool.known
    x = history.alphabet[:1].expand(history.rows, 8, -1)
    close(history.blocks[0](x, state=state), history.blocks[1](x))


def test_what_a_pool_shares():
    """Five tokens in chunks of two are two pages and an open chunk; a page is one where it follows the same page."""

    def tokens(*words):
        return torch.tensor(words).float().view(-1, 2, 1, 1)  # pages of two tokens

    pool = PagePool(torch.zeros(0, 2, 1, 1), torch.zeros(0, 2, 1, 1))

    def extend(path, *words):
        return pool.extend(path, tokens(*words), -tokens(*words), most=100)

    first = extend((), 1, 2, 3, 4)
    assert len(pool) == 2
    same, other = extend((), 1, 2, 3, 4, 5, 6), extend((), 3, 4, 1, 2)
    assert same[:2] == first and len(pool) == 5 and not set(other) & set(same)
    assert extend(first, 5, 6) == same  # found again, one after the other
    extend((), 1, 2, 3, 9)
    assert len(pool) == 5  # gone at once: nobody kept it
    assert torch.equal(pool.k[[p.slot for p in same]], tokens(1, 2, 3, 4, 5, 6))
    del first
    assert len(pool) == 5
    del same
    assert len(pool) == 2
    del other
    assert len(pool) == 0 and not pool.known
    room = len(pool.k)
    again = extend((), *range(2 * room))
    assert len(again) == len(pool) == len(pool.k) == room  # every slot is used again


def test_only_equal_bits_are_shared():
    x = draw(1, 4, 1, 2, dtype=torch.float32)
    x[0, 0, 0, 0] = 0
    for name in ("float32", "float64", "bfloat16", "float16"):
        k = x.to(getattr(torch, name))
        pool = PagePool(k[:0], k[:0])
        page = pool.extend((), k, k, 9)
        assert pool.extend((), k.clone(), k.clone(), 9) == page
        for b, value in ((0, -0.0), (1, None)):
            changed = k.clone()
            cell = changed.view(-1)[b : b + 1]
            cell.copy_(torch.tensor(value) if value is not None else torch.nextafter(cell.float() * 1.01, cell.float()))
            other, third = pool.extend((), changed, k, 9), pool.extend((), k, changed, 9)
            assert len({*page, *other, *third}) == 3 == len(pool)
        nan = torch.full_like(k, float("nan"))
        held = pool.extend((), nan, nan, 9)
        assert pool.extend((), nan, nan, 9) == held


@torch.no_grad()
def test_equal_checksums_are_not_enough(monkeypatch):
    monkeypatch.setattr(prefix_tree, "_checksums", lambda k, v: [7] * len(k))
    tree, dense = build(chunk_size=3)
    x = together(draw(4, 40, DIM), 17, 4)
    states = [block.init_state(4, 40) for block in (tree, dense)]
    for part in x.split([20, 1, 1, 11, 7], 1):
        close(tree(part, state=states[0]), dense(part, state=states[1]))
        agree(*states)


@torch.no_grad()
def test_a_common_prefix_is_held_once():
    tree, dense = build(chunk_size=32)
    x = together(draw(4, 600, DIM), 512, 4)
    state, plain = tree.init_state(4, 600), dense.init_state(4, 600)
    assert state.nbytes < 0.06 * plain.nbytes and state.max_nbytes == tree.state_bytes(4, 600)
    close(tree(x[:, :520], state=state), dense(x[:, :520], state=plain))
    assert len(state.pool) == 512 // 32
    close(tree(x[:, 520:], state=state), dense(x[:, 520:], state=plain))
    assert len(state.pool) == 512 // 32 + 4 * 2  # 600 = 16 * 32 + 2 * 32 + 24
    assert state.nbytes < 0.5 * plain.nbytes
    full = tree.init_state(4, 600)
    tree(draw(4, 600, DIM), state=full)
    assert full.nbytes == full.max_nbytes == tree.state_bytes(4, 600) > plain.nbytes  # by the open chunks
    assert tree.cost(4, 1, 599, "decode").state_bytes == tree.state_bytes(4, 600)


@torch.no_grad()
def test_repeated_rows_add_nothing_until_they_part():
    tree, dense = build(chunk_size=8)
    x = draw(6, 60, DIM)
    state, plain = tree.init_state(1, 60), dense.init_state(1, 60)
    for s, block in ((state, tree), (plain, dense)):
        block(x[:1, :50], state=s)
        s.reorder(torch.zeros(6, dtype=torch.int64))
    bytes_before, pages = state.pool.nbytes(), len(state.pool)
    assert pages == 6
    step = x[:1, 50:55].expand(6, -1, -1)
    close(tree(step, state=state), dense(step, state=plain))  # one by one they would be equal still
    assert len(state.pool) == pages
    close(tree(x[:, 55:58], state=state), dense(x[:, 55:58], state=plain))
    assert len(state.pool) == pages + 6 and state.pool.nbytes() > bytes_before
    state.reorder(torch.tensor([3, 3, 3]))  # the beam narrows, and what was left behind is free
    assert len(state.pool) == pages + 1


@torch.no_grad()
def test_rows_from_elsewhere_share_what_is_here():
    """A server reads a request in a state of its own and puts it into a free row."""
    tree, dense = build(chunk_size=4)
    x = together(draw(3, 30, DIM), 20, 3)
    state = tree.init_state(3, 40)
    for b in range(3):
        alone = tree.init_state(1, 40)
        tree(x[b : b + 1], state=alone)
        state.put_rows(torch.tensor([b]), alone)
        del alone
    assert len(state.pool) == 20 // 4 + 3 * 2 and {p.pool for p in pages_of(state)} == {state.pool}
    more, plain = draw(3, 9, DIM, seed=4), dense.init_state(3, 40)
    dense(x, state=plain)
    close(tree(more, state=state), dense(more, state=plain))
    other = tree.init_state(2, 40)
    other.restore(state.rows(torch.tensor([2, 0])))
    state.reset()
    close(tree(more[:2, :1], state=other), dense(more[:2, :1], state=plain.rows(torch.tensor([2, 0]))))


@torch.no_grad()
def test_a_copy_has_its_own_rows():
    tree, _ = build(chunk_size=4)
    state = tree.init_state(2, None)
    tree(draw(2, 11, DIM), state=state)
    copies = [state.clone(), state.snapshot(), copy.deepcopy(state), state.rows(torch.tensor([0, 1]))]
    held = list(state.held)
    for other in copies:
        tree(draw(2, 9, DIM, seed=7), state=other)
        assert state.held == held and other.pool is state.pool and len(other.held[0].pages) == 5
    del other
    copies.clear()
    assert len(state.pool) == 4


def test_plan_of_a_tree(monkeypatch):
    pool = PagePool(torch.zeros(9, 1, 1, 1), torch.zeros(9, 1, 1, 1))
    a, b, c, d, e, f = (Page(pool, i) for i in (0, 1, 4, 3, 2, 5))
    paths = [(a, b, c), (a, b, d), (e,), (a, b, c, f), ()]
    monkeypatch.setattr(prefix_tree, "WORTH_A_CALL", 1)
    shared, private = plan(paths, 1, pool.k.device)
    found = [[(rows.tolist(), at if isinstance(at, slice) else at.tolist()) for rows, at in level] for level in shared]
    assert found == [[([0, 1, 3], slice(0, 2))], [([0, 3], slice(4, 5))]]
    assert private is not None and private[0, 0].tolist() == [[-1], [3], [2], [5], [-1]]
    monkeypatch.setattr(prefix_tree, "WORTH_A_CALL", 4)
    shared, private = plan(paths, 1, pool.k.device)  # two rows of one page read it for themselves
    assert len(shared) == 1 and private is not None
    assert private[0, 0].tolist() == [[4, -1], [3, -1], [2, -1], [4, 5], [-1, -1]]
    monkeypatch.setattr(prefix_tree, "WORTH_A_CALL", 5)
    assert plan(paths, 1, pool.k.device).shared == []


@pytest.mark.parametrize("worth", [1, 10**6])
def test_gradients_stop_at_the_segment(worth, monkeypatch):
    """As with the plain cache; the pool may be written before backward."""
    monkeypatch.setattr(prefix_tree, "WORTH_A_CALL", worth)
    found = []
    for block in build(chunk_size=3):
        x = together(draw(3, 24, DIM), 10, 3).requires_grad_()
        state = block.init_state(3, 24)
        y = torch.cat([block(part, state=state) for part in x.split([11, 6, 1, 6], 1)], 1)
        loss = (y * draw(3, 24, DIM, seed=5)).sum()
        found.append((y, *torch.autograd.grad(loss, [x, *block.parameters()])))
    close(*found)


@torch.no_grad()
def test_prompts_with_a_common_beginning(monkeypatch):
    """model.generate shares a system prompt by itself: the tokens of the plain cache, in fewer bytes."""
    generator = torch.Generator().manual_seed(3)
    system, own = torch.randint(50, (1, 256), generator=generator), torch.randint(50, (4, 20), generator=generator)
    prompts = torch.cat([system.expand(4, -1), own], 1)
    prompts[:, 256] = torch.arange(4)
    states, texts = [], []
    for cache in (None, "prefix_tree"):
        layer = [{"attention": {"num_heads": 4, "num_kv_heads": 2, **({} if cache is None else {"cache": cache})}}]
        model = zoo.build({"dim": 64, "vocab_size": 50, "trunk": [{"repeat": 2, "of": [[*layer, "swiglu"]]}]}).eval()
        init_state = model.init_state
        monkeypatch.setattr(model, "init_state", lambda *size: states.append(init_state(*size)) or states[-1])  # noqa: B023
        texts.append(model.generate(prompts, 24))
        report = zoo.estimate(model, batch_size=4, seq_len=1, context_len=299, mode="decode")
        assert report.state_bytes == states[-1].max_nbytes  # the worst case: nothing shared
    assert torch.equal(*texts)
    plain, tree = states
    # of 299 tokens 256 are in the 8 pages of all rows, 32 in a page of each row, 11 in its open chunk
    assert [len(s.pool) for s in tree.walk() if isinstance(s, PrefixState)] == [8 + 4, 8 + 4]
    assert tree.nbytes < 0.5 * plain.nbytes


def test_errors():
    with pytest.raises(ValueError, match="at least 1"):
        build(chunk_size=0)
    with pytest.raises(ValueError, match="does not go with window"):
        build(window=8)
    tree, _ = build()
    state = tree.init_state(2, 10)
    tree(draw(2, 8, DIM), state=state)
    with pytest.raises(ValueError, match="up to max_len=10 tokens a row: 8 are in it and 3 more"):
        tree(draw(2, 3, DIM), state=state)
