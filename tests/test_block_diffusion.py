"""Block diffusion against plain transformers with explicit masks: loss, sampler, caches, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import zoo
import zoo.kernels.flops  # formulas that torch lacks
from zoo.architectures.block_diffusion import RECIPES
from zoo.architectures.causal_lm import CausalLM
from zoo.kernels.attention import TwoCopies, attention
from zoo.kernels.rope import rope

V, MASK = 29, 28
DENSE = [{"repeat": 2, "of": [[{"attention": {"num_heads": 2}}, {"swiglu": {"hidden_dim": 24}}]]}]


def build(recipe="bd3", block=4, trunk=DENSE, **more):
    config = {
        "dim": 32, "vocab_size": V, "trunk": trunk, "diffusion": {"recipe": recipe, "block_size": block, **more}
    }  # fmt: skip
    model = zoo.build(config, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # away from the near-uniform start
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * 2 / max(p.shape[-1:]) ** 0.5)
    return model


def tokens(length, rows=2, seed=0):
    return torch.randint(MASK, (rows, length), generator=torch.Generator().manual_seed(seed))


def two_copies_mask(n, block, causal):
    """Query q may see key k; the noisy copy is 0 .. n-1, the clean one n .. 2n-1."""
    seen = torch.zeros(2 * n, 2 * n, dtype=torch.bool)
    for q in range(2 * n):
        for k in range(2 * n):
            i, j = q % n, k % n
            if q < n and k < n:
                seen[q, k] = i // block == j // block
            elif q < n:
                seen[q, k] = j // block < i // block
            elif k >= n:
                seen[q, k] = j <= i if causal else j // block <= i // block
    return seen


# ------------------------------------------------------------------------------------------- the mask
@pytest.mark.parametrize("backend", ["auto", "chunked"])
@pytest.mark.parametrize(
    ("block", "causal", "packed"), [(1, False, False), (3, False, True), (4, True, True), (12, True, False)]
)
def test_attention_over_two_copies(block, causal, packed, backend):
    n, generator = 12, torch.Generator().manual_seed(block)
    q, k, v = (
        torch.randn(2, 2 * n, h, 8, dtype=torch.float64, generator=generator).requires_grad_() for h in (4, 2, 2)
    )
    sinks = torch.randn(4, dtype=torch.float64, generator=generator).requires_grad_()
    docs = torch.tensor([0] * 5 + [1] * 7).expand(2, n) if packed else None
    copies = TwoCopies(block, causal, docs)
    o, lse = attention(
        q, k, v, q_doc_ids=copies, k_doc_ids=copies, sink_logits=sinks, softcap=3.0, need_lse=True, backend=backend
    )
    s = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(2, 2)) * 8**-0.5
    seen = two_copies_mask(n, block, causal)
    if docs is not None:
        twice = torch.cat([docs, docs], 1)[0]
        seen = seen & (twice[:, None] == twice)
    s = (3 * torch.tanh(s / 3)).masked_fill(~seen, -math.inf)
    s = torch.cat([s, sinks[:, None, None].expand(2, 4, 2 * n, 1)], -1)
    expected = torch.einsum("bhts,bshd->bthd", s.softmax(-1)[..., :-1], v.repeat_interleave(2, 2))
    torch.testing.assert_close(o, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, s.logsumexp(-1).transpose(1, 2), rtol=0, atol=1e-12)
    up = torch.randn(o.shape, dtype=o.dtype, generator=generator)
    inputs = (q, k, v, sinks)
    for a, b in zip(torch.autograd.grad(o, inputs, up), torch.autograd.grad(expected, inputs, up), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_two_copies_must_be_whole_blocks_of_a_whole_row():
    q = torch.randn(1, 14, 2, 8)
    with pytest.raises(ValueError, match="14 tokens are not two copies of whole blocks of 4"):
        attention(q, q, q, q_doc_ids=TwoCopies(4), k_doc_ids=TwoCopies(4))
    with pytest.raises(ValueError, match="no window"):
        attention(q, q, q, q_doc_ids=TwoCopies(7), k_doc_ids=TwoCopies(7), window=3)
    with pytest.raises(ValueError, match="for both"):
        attention(q, q, q, k_doc_ids=TwoCopies(7))


# ------------------------------------------------------------------------------- a plain transformer
def plain(model, x, seen):
    """Logits [B, T, V] of tokens x [B, T] at positions 0.. under a mask [T, T], written out."""
    h = model.tok_embeddings(x)
    T = x.shape[1]
    for layer in (item for copies in model.layers for item in copies.modules() if hasattr(item, "block_name")):
        y = layer.norm(h)
        block = layer.block
        if layer.block_name == "swiglu":
            h = h + block(y)
            continue
        q, k, v = (p(y).unflatten(-1, (block.num_heads, -1)) for p in (block.q_proj, block.k_proj, block.v_proj))
        q, k = (rope(z, torch.arange(T).expand(len(x), T), backend="reference") for z in (q, k))
        s = torch.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
        a = s.masked_fill(~seen, -math.inf).softmax(-1)
        h = h + block.o_proj(torch.einsum("bhts,bshd->bthd", a, v).flatten(2))
    return model.lm_head(model.norm(h))


def context_mask(T, block, causal, start):
    """The clean tokens before `start`, and behind it one block that sees everything."""
    i = torch.arange(T)
    seen = i <= i[:, None] if causal else i // block <= i[:, None] // block
    return seen | (i[:, None] >= start)


def block_logits(model, x, start):
    """Logits of the block of x that begins at `start` given the finished blocks before it; no cache, no copies."""
    L = model.block_size
    part = x[:, : start + L]
    return plain(model, part, context_mask(start + L, L, model.recipe.causal_context, start))[:, start:]


def without_mask(logits):
    return torch.cat([logits[..., :-1], torch.full_like(logits[..., :1], -math.inf)], -1)


def crossentropy(logits, x):
    return F.cross_entropy(logits.transpose(1, 2), x, reduction="none")


def naive_losses(model, x, noise):
    """Block by block, each run on its own."""
    masks = [noise > 0] + ([noise == 0] if model.recipe.complementary else [])
    total = torch.zeros(x.shape, dtype=torch.float64)
    for mask in masks:
        logits = []
        for start in range(0, x.shape[1], model.block_size):
            mixed = torch.cat([x[:, :start], torch.where(mask, MASK, x)[:, start:]], 1)
            logits.append(block_logits(model, mixed, start))
        logits = torch.cat(logits, 1)
        if model.recipe.shift:
            loss = F.pad(crossentropy(logits[:, :-1], x[:, 1:]), (1, 0))
        else:
            loss = crossentropy(without_mask(logits), x)
        weight = 1 / torch.where(mask, noise, 1) if model.recipe.weighted else 1.0
        total += torch.where(mask, loss * weight, 0)
    if model.recipe.causal_context:
        T = x.shape[1]
        logits = plain(model, x, torch.ones(T, T, dtype=torch.bool).tril())
        total += model.ar_weight * F.pad(crossentropy(logits[:, :-1], x[:, 1:]), (1, 0))
    return total


def some_noise(shape, seed=5):
    rng = torch.Generator().manual_seed(seed)
    rate = 0.2 + 0.7 * torch.rand(shape, generator=rng, dtype=torch.float64)
    return rate * (torch.rand(shape, generator=rng) < rate)


def test_block_size_of_a_batch():
    x, noise = tokens(12), some_noise((2, 12))
    other = build("nbdiff", 6).losses(x, noise)
    torch.testing.assert_close(build("nbdiff", 12).losses(x, noise, None, 6), other, rtol=0, atol=0)


@pytest.mark.parametrize("block", [1, 4, 12])
@pytest.mark.parametrize("recipe", list(RECIPES))
def test_loss_is_that_of_the_blocks_one_by_one(recipe, block):
    model = build(recipe, block, **({"ar_weight": 0.7} if recipe == "nbdiff" else {}))
    x, noise = tokens(12), some_noise((2, 12))
    if recipe == "fast_dllm":
        assert len(model.losses(x, noise)) == 2
    expected = naive_losses(model, x, noise)
    torch.testing.assert_close(model.losses(x, noise), expected, rtol=0, atol=1e-10)
    ours = torch.autograd.grad(model.losses(x, noise).sum(), list(model.parameters()))
    for a, b in zip(
        ours, torch.autograd.grad(naive_losses(model, x, noise).sum(), list(model.parameters())), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_documents_of_a_packed_row_do_not_see_each_other():
    model, x, noise = build("bd3", 4), tokens(16), some_noise((2, 16))
    docs = torch.tensor([3] * 8 + [5] * 8).expand(2, 16)
    alone = torch.cat([model.losses(x[:, :8], noise[:, :8]), model.losses(x[:, 8:], noise[:, 8:])], 1)
    torch.testing.assert_close(model.losses(x, noise, docs), alone, rtol=0, atol=1e-10)


def test_blocks_of_one_token_are_the_autoregressive_likelihood():
    """p(x_i | x_0 .. x_i-1) read at a mask behind them; its expectation over the noise is the same at every rate."""
    model, x = build("bd3", 1), tokens(9)
    nats = []
    for i in range(9):
        asked = torch.cat([x[:, :i], torch.full((2, 1), MASK)], 1)
        nats.append(crossentropy(without_mask(model(asked)[:, -1:]), x[:, i : i + 1]))
    likelihood = torch.cat(nats, 1)
    torch.testing.assert_close(model.losses(x, torch.ones(2, 9)), likelihood, rtol=0, atol=1e-10)
    # the noise of other tokens plays no part, so a token has two outcomes: t * (c / t) + (1 - t) * 0
    rate = 0.25
    for odd in (False, True):
        noise = torch.zeros(2, 9)
        noise[:, odd::2] = rate
        got = model.losses(x, noise)
        torch.testing.assert_close(rate * got[:, odd::2], likelihood[:, odd::2], rtol=0, atol=1e-10)
        assert not got[:, 1 - odd :: 2].any()


def test_clean_copy_of_nbdiff_is_the_causal_model():
    model, x = build("nbdiff", 4), tokens(12)
    for masked in (torch.zeros(2, 12, dtype=torch.bool), torch.ones(2, 12, dtype=torch.bool)):
        torch.testing.assert_close(model.lm_head(model.two_copies(x, masked)[1]), model(x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_no_token_sees_itself_unmasked(recipe):
    """Clean tokens of a block change nothing in its own noisy copy nor in the blocks before it."""
    model, x = build(recipe, 4), tokens(12)
    other = x.clone()
    other[:, 5] = (x[:, 5] + 1) % MASK
    masked = torch.ones(2, 12, dtype=torch.bool)
    a, b = (model.two_copies(y, masked)[0] for y in (x, other))
    assert torch.equal(a[:, :8], b[:, :8]) and not torch.allclose(a[:, 8:], b[:, 8:])


# ------------------------------------------------------------------------------------------- sampling
GRAPHS = {
    "mla": [[{"mla": {"num_heads": 2, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
                      "v_head_dim": 8}}, "swiglu"]],
    "loop": [{"loop": {"steps": 2, "of": [[{"attention": {"num_heads": 2, "num_kv_heads": 1}}, "swiglu"]]}}],
    "experts": [[{"attention": {"num_heads": 2, "sink_logits": True}},
                 {"blockffn": {"num_experts": 4, "expert_dim": 8}}]],
    "parallel": [{"parallel": ["attention", "mlp"], "merge": "mean"},
                 {"revisit": [["swiglu"], ["swiglu"]], "at": 1, "hidden_dim": 16, "attention": {"num_heads": 2}}],
    "stage": [{"stage": {"steps": 2, "of": ["attention", "swiglu"]}}],
    "loop_kv": [{"loop": {"steps": 2, "kv": "first", "of": ["attention", "swiglu"]}}],
    "shared": [{"repeat": 2, "of": [["attention", "moe"]], "share": "a"}, {"share": "a"}],
}  # fmt: skip


@pytest.mark.parametrize("recipe", list(RECIPES))
@pytest.mark.parametrize("graph", list(GRAPHS))
def test_a_step_over_the_cache_is_a_row_of_training(graph, recipe):
    """Noisy logits of each block = a pass over it behind the cache of the finished blocks, on any graph."""
    model = build(recipe, 4, GRAPHS[graph]).eval()
    x, noise = tokens(12), some_noise((2, 12))
    with torch.no_grad():
        noisy, _ = model.two_copies(x, noise > 0)
        state = model.init_state(2, 12)
        for start in range(0, 12, 4):
            block = torch.where(noise > 0, MASK, x)[:, start : start + 4]
            step = model._run(state, block, start, 4)
            torch.testing.assert_close(step, noisy[:, start : start + 4], rtol=0, atol=1e-10)
            model._run(state, x[:, start : start + 4], start, 1 if model.recipe.causal_context else 4)


def test_layers_compile_whole():
    model, x, masked = build("bd3", 4, GRAPHS["experts"]), tokens(12), some_noise((2, 12)) > 0
    expected, _ = model.two_copies(x, masked)
    for layer in model.layers:
        layer.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(model.two_copies(x, masked)[0], expected, rtol=0, atol=1e-10)


def test_every_graph_trains():
    for graph in GRAPHS.values():
        model = build("fast_dllm", 4, graph).train()
        model.losses(tokens(12), some_noise((2, 12))).sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def naive_sampler(model, prompt, new, threshold, sub_block):
    """Greedy, one row, every step from nothing."""
    L = model.block_size
    row = torch.cat([prompt, torch.full((1, -(-(prompt.shape[1] + new) // L) * L - prompt.shape[1]), MASK)], 1)
    given = prompt.shape[1]
    done = [i < given for i in range(row.shape[1])]
    for start in range(given // L * L, row.shape[1], L):
        if model.recipe.shift and start >= given:
            T = start
            seen = context_mask(T, L, model.recipe.causal_context, T)
            row[0, start] = without_mask(plain(model, row[:, :T], seen))[0, -1].argmax()
            done[start] = True
        for first in range(start, start + L, sub_block):
            while not all(done[first : first + sub_block]):
                p = block_logits(model, row, start)
                if model.recipe.shift:
                    p = torch.cat([p[:, :1], p[:, :-1]], 1)
                p = without_mask(p)[0].softmax(-1)
                left = [i for i in range(first, first + sub_block) if not done[i]]
                sure = {i: float(p[i - start].max()) for i in left}
                best = max(left, key=sure.get)
                for i in left:
                    if i == best or sure[i] > threshold:
                        row[0, i], done[i] = p[i - start].argmax(), True
    return row[:, : given + new]


@pytest.mark.parametrize(("given", "new", "sub_block"), [(1, 7, 4), (6, 9, 4), (8, 4, 2), (3, 5, 1)])
@pytest.mark.parametrize("recipe", list(RECIPES))
def test_sampler_is_the_one_without_caches(recipe, given, new, sub_block):
    model = build(recipe, 4, threshold=0.3).eval()
    model.sampler.sub_block, model.sampler.reuse = sub_block, False
    prompt = tokens(given, rows=3, seed=given)
    with torch.no_grad():
        expected = torch.cat([naive_sampler(model, prompt[i : i + 1], new, 0.3, sub_block) for i in range(3)])
    assert torch.equal(model.generate(prompt, new), expected)


def test_sub_block_cache_is_exact_where_nothing_goes_stale():
    """In one layer keys and values depend on their own token alone, and outside the active sub-block none changes."""
    layer = [[{"attention": {"num_heads": 2}}, {"swiglu": {"hidden_dim": 24}}]]
    model = build("fast_dllm", 8, layer, threshold=0.3, sub_block=4).eval()
    assert model.sampler.reuse
    prompt = tokens(3)
    cached = model.generate(prompt, 29)
    model.sampler.reuse = False
    assert torch.equal(model.generate(prompt, 29), cached)


def passes(model, monkeypatch, *args, **options):
    """How many tokens each pass of `generate` ran over."""
    counts, run = [], model._run
    monkeypatch.setattr(
        model, "_run", lambda state, x, at, block: (counts.append(x.shape[1]), run(state, x, at, block))[1]
    )
    model.generate(*args, **options)
    return counts


def test_later_passes_run_over_the_sub_block_alone(monkeypatch):
    model = build("fast_dllm", 8, threshold=1.5, sub_block=4)
    counts = passes(model, monkeypatch, tokens(8), 8)
    # the finished block, whose last token gives the first of the next; then three tokens of the first sub-block: the
    # whole block once; and four of the second, whose first token is predicted from outside of it
    assert counts[:4] == [8, 8, 4, 4] and len(counts) == 8
    wholes = counts[4:].count(8)
    assert 1 <= wholes <= 4 and counts[4:] == [8] * wholes + [4] * (4 - wholes)


def test_threshold_sets_the_number_of_passes(monkeypatch):
    model = build("bd3", 4)
    assert passes(model, monkeypatch, tokens(4), 8) == [4] * (2 + 8)  # two finished blocks, and one pass a token
    model.sampler.threshold = 0.0
    assert passes(model, monkeypatch, tokens(4), 8) == [4] * (2 + 2)
    model.sampler.threshold = 1.0
    assert passes(model, monkeypatch, tokens(6), 6) == [4] * (2 + 2 + 4)


@pytest.mark.parametrize("recipe", ["fast_dllm", "nbdiff"])
def test_shifted_blocks_of_one_token_are_autoregressive(recipe):
    model, prompt = build(recipe, 1), tokens(5)
    with torch.no_grad():  # a causal model that never says MASK
        x = prompt
        for _ in range(8):
            x = torch.cat([x, without_mask(model(x)[:, -1:]).argmax(-1)], 1)
    assert torch.equal(model.generate(prompt, 8), x)


def test_drawing():
    model, prompt = build("bd3", 4), tokens(5)
    a, b, c = (model.generate(prompt, 10, 1.0, seed=s) for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert not (a == MASK).any() and torch.equal(a[:, :5], prompt) and a.shape == (2, 15)
    assert torch.equal(model.generate(prompt, 0), prompt)
    assert torch.equal(model.generate(prompt, 6, 1.0, top_k=1, seed=3)[:, :5], prompt)
    assert torch.equal(torch.cat(list(model.stream(prompt, 10, 1.0, seed=1)), 1), c[:, 5:])
    model.sampler.sub_block = 3
    with pytest.raises(ValueError, match="sub_block=3 must divide block_size=4"):
        model.generate(prompt, 4)


def test_saved_models_diffuse(tmp_path):
    model = build("nbdiff", 4, threshold=0.4)
    model.save_pretrained(tmp_path)
    again = zoo.from_pretrained(tmp_path)
    assert again.sampler == model.sampler
    assert torch.equal(again.generate(tokens(5), 9), model.generate(tokens(5), 9))
    assert type(zoo.build({"dim": 32, "vocab_size": V, "trunk": DENSE})) is CausalLM


# ------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("trunk", "where"),
    [
        (["gla"], "trunk[0]: gla"),
        ([{"attention": {"window": 8}}], "trunk[0].attention: attention"),
        ([{"attention": {"select": "quest"}}], "trunk[0].attention: attention"),
        ([{"attention": {"cache": "h2o"}}], "trunk[0].attention: attention"),
        (["dsa"], "trunk[0]: dsa"),
        ([["attention", "rwkv7_ffn"]], "trunk[0][1]: rwkv7_ffn"),
        ([{"repeat": 1, "of": ["attention", {"moba": {"block_size": 4}}]}], "trunk[0].of[1].moba: moba"),
    ],
)
def test_blocks_that_cannot_see_later_tokens_are_named(trunk, where):
    with pytest.raises(zoo.ConfigError) as caught:
        build(trunk=trunk)
    assert len(caught.value.problems) == 1
    assert f"{where} with these options cannot show a token the later ones of its block" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {
                "trunk": [
                    {
                        "hierarchy": {
                            "chunker": {"fixed_chunks": {"length": 4}},
                            "of": ["attention"],
                            "decoder": ["attention"],
                        }
                    }
                ]
            },
            "hierarchy goes by the order of tokens",
        ),
        ({"trunk": [{"loop": {"steps": 3, "ring": 2, "of": ["attention"]}}]}, "loop goes by the order of tokens"),
        ({"trunk": [{"route": ["attention"], "router": {"mod": {"capacity": 0.5}}}]}, "mod chooses among tokens"),
        ({"diffusion": {"recipe": "bd4"}}, "diffusion.recipe: must be one of bd3, fast_dllm, nbdiff"),
        ({"diffusion": {"clip": [0.8, 0.3]}}, "diffusion.clip: must be two shares, the lower one first"),
        ({"diffusion": {"sub_block": 5}}, "diffusion.sub_block: must divide block_size 16, got 5"),
    ],
)
def test_configurations_that_cannot_work(change, words):
    config = {"dim": 32, "vocab_size": V, "trunk": DENSE, "diffusion": {"block_size": 4}}
    with pytest.raises(zoo.ConfigError) as caught:
        zoo.load_config(config | change)
    assert words in str(caught.value)


@pytest.mark.parametrize("name", ["bd3_small", "nbdiff_small", "fast_dllm_small"])
def test_a_training_step_costs_what_is_counted(name):
    """A pass over the noisy and the clean copy; useful are the pairs of its mask, one by one."""
    n, block, rows = 64, 16, 2
    model = zoo.build(name, ["dim=64", "vocab_size=61", "trunk[0].repeat=2", f"diffusion.block_size={block}"])
    report = zoo.estimate(model, batch_size=rows, seq_len=n)
    noise = torch.full((rows, n), 0.5)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.losses(torch.zeros(rows, n, dtype=torch.int64), noise)
    assert report.flops == 3 * counter.get_total_flops()
    i, j = torch.arange(n)[:, None], torch.arange(n)
    clean = j <= i if model.recipe.causal_context else j // block <= i // block
    noisy = (j // block < i // block).sum() + (j // block == i // block).sum()
    attention = model.layers[0].items[0].block
    passes = rows * (2 if model.recipe.complementary else 1)
    unused = 2 * n * n + n * block - int(clean.sum() + noisy)
    assert report.flops - report.useful_flops == 3 * passes * 2 * unused * 4 * attention.num_heads * attention.head_dim
