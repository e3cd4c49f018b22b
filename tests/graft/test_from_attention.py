"""What a block makes of the attention it takes the place of: near it, and equal to it where its form allows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

import zoo
from zoo.blocks.grafting import decay_logit, inverse_softplus, low_rank
from zoo.graft import plan, replace
from zoo.kernels.rope import rope

HEADS, WIDTH, DIM = 4, 16, 64
SHARED = {"num_kv_heads": 2}


def host(**options):
    """A model of one layer of attention, in fp64."""
    torch.manual_seed(0)
    attention = {"attention": {"num_heads": HEADS, **options}}
    return zoo.build({"dim": DIM, "vocab_size": 11, "trunk": [attention]}).double()


def grafted(name, of=(), **options) -> tuple[Any, Any]:
    """The block in the place of attention with options `of`, and the attention."""
    done = replace(host(**dict(of)), "attention", name, **options)
    (block,), (attention,) = done.blocks.values(), done.originals.values()
    return block, attention


def rows(*shape):
    return torch.randn(*shape, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def sums(attention, x, **rotary):
    """sum_{j<=t} (q_t . k_j) v_j, [B, T, H, d]: unnormalised linear attention on the maps of attention."""
    q, k, v = (p(x).unflatten(-1, (-1, WIDTH)) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    if rotary:
        positions = torch.arange(x.shape[1]).expand(x.shape[0], -1)
        q, k = (rope(t, positions, **rotary) for t in (q, k))
    k, v = (t.repeat_interleave(HEADS // t.shape[2], 2) for t in (k, v))
    weight = torch.einsum("bthd,bshd->bhts", q, k).tril()
    return torch.einsum("bhts,bshd->bthd", weight, v)


def of_size(attention, o):
    """W_o of heads with a root mean square of one, times what the values have in each channel."""
    v = attention.v_proj.weight.unflatten(0, (-1, WIDTH))
    size = v.square().sum(-1).mean(0).sqrt()
    return attention.o_proj((F.rms_norm(o, (WIDTH,), eps=0) * size).flatten(2))


@torch.no_grad()
def test_mamba2_without_decay_is_unnormalised_linear_attention():
    """With C = q, B = k and x = v, the state space duality. SiLU is linear in the limit of small inputs."""
    block, attention = grafted("mamba2", SHARED, gated_norm=False)
    assert block.D.abs().max() == 0
    block.A_log.fill_(-torch.inf)
    small = 1e-5
    block.conv1d.weight[..., -1] = small
    x = rows(2, 11)
    want = attention.o_proj(sums(attention, x).flatten(2))
    torch.testing.assert_close(block(x) / (small / 2) ** 3, want, rtol=1e-3, atol=1e-3)


ALIKE = [("gla", {"gate": "none"}), ("simple_gla", {"gate": "none"}), ("retention", {"decay": 1.0, "rotary": False})]


@pytest.mark.parametrize("name, options", ALIKE, ids=lambda v: v if isinstance(v, str) else "")
@torch.no_grad()
def test_linear_attention_has_the_size_of_the_values(name, options):
    block, attention = grafted(name, SHARED, **options)
    x = 100 * rows(2, 11)  # so large that the eps of the norm is nothing
    torch.testing.assert_close(block(x), of_size(attention, sums(attention, x)))


@pytest.mark.parametrize("interleaved", [False, True])
@torch.no_grad()
def test_retention_turns_the_channels_that_attention_turns(interleaved):
    base = 10000.0 ** (WIDTH / (WIDTH - 2))  # the spacing of the paper's angles
    block, attention = grafted("retention", {"rope_base": base, "rope_interleaved": interleaved}, decay=1.0)
    x = 100 * rows(2, 11)
    want = of_size(attention, sums(attention, x, base=base, interleaved=interleaved))
    torch.testing.assert_close(block(x), want)


@torch.no_grad()
def test_queries_are_told_from_an_output_gate():
    block, attention = grafted("simple_gla", {"output_gate": True}, gate="none")
    queries = attention.q_proj.weight.unflatten(0, (HEADS, 2, WIDTH))[:, 0].flatten(0, 1)
    assert torch.equal(block.q_proj.weight, queries) and torch.equal(block.k_proj.weight, attention.k_proj.weight)


MEANS = [
    ("rg_lru", {}), ("lru", {}), ("s4d", {}), ("s4d", {"init": "inv"}), ("hyena", {"filter_len": 16}),
    ("hyena", {"order": 3, "filter_len": 16}), ("mamba", {}), ("linear_attention", {}), ("based", {}),
]  # fmt: skip


@pytest.mark.parametrize("name, options", MEANS, ids=lambda v: v if isinstance(v, str) else "")
@torch.no_grad()
def test_a_row_that_repeats_one_token_comes_out_as_of_attention(name, options):
    """All keys are alike, so attention gives W_o W_v x, and so does what reads a mean of the values."""
    block, attention = grafted(name, SHARED, **options)
    x = 1e-4 * rows(2, 1).expand(-1, 200, -1)  # where activations are linear
    got, want = block(x)[:, -1], attention(x)[:, -1]
    torch.testing.assert_close(got, want, rtol=0, atol=0.01 * want.std().item())


@torch.no_grad()
def test_chunks_of_one_token_are_attention():
    block, attention = grafted("rat", SHARED, chunk_size=1)
    x = rows(2, 17)
    torch.testing.assert_close(block(x), attention(x), rtol=1e-8, atol=1e-8)


# policies at the setting where every key is read or kept, with blocks so small that there is something to choose
READ_ALL = {
    "quest": {"block_size": 4, "top_k": 99}, "lserve": {"block_size": 4, "page_size": 2, "streaming_heads": []},
    "xattention": {"block_size": 4, "stride": 2, "tau": 2.0}, "pbs": {"block_size": 4, "segment_size": 8, "tau": 2.0},
    "anchor": {"block_size": 4, "step": 2, "init": 4, "theta": 1e6},
}  # fmt: skip
KEEP_ALL = {
    "h2o": {"heavy": 99, "recent": 1, "interval": 5}, "streaming_llm": {"window": 99}, "prefix_tree": {"chunk_size": 4},
}  # fmt: skip


@pytest.mark.parametrize("kind", ["select", "cache"])
@torch.no_grad()
def test_every_policy_is_exact_where_it_covers_everything(kind):
    dense = {"select": READ_ALL, "cache": KEEP_ALL}[kind]
    assert sorted(dense) == sorted(zoo.list_blocks(kind)), "a new policy says here when it is attention"
    x = rows(2, 23)
    for name, options in dense.items():
        block, attention = grafted("attention", SHARED, **{kind: {name: options}})
        want = attention(x)
        torch.testing.assert_close(block(x), want, rtol=1e-8, atol=1e-8, msg=lambda m, name=name: f"{name}: {m}")
        state = block.init_state(2, 23)
        cut = torch.cat([block(part, state=state) for part in x.split([9, 1, 1, 12], 1)], 1)
        torch.testing.assert_close(cut, want, rtol=1e-8, atol=1e-8, msg=lambda m, name=name: f"{name}: {m}")


DONORS = {
    "wide": SHARED | {"head_dim": 24}, "turned": {"bias": True, "rope_interleaved": True, "rotary_dim": 8},
    "gated": {"output_gate": True},
}  # fmt: skip
MIXERS = [n for n in zoo.list_blocks("mixer") if n not in ("jrt", "prefix_lm")]


@pytest.mark.parametrize("donor", DONORS)
@pytest.mark.parametrize("name", MIXERS)
@torch.no_grad()
def test_every_mixer_takes_what_fits_of_every_attention(name, donor):
    """Heads that are wider together than the stream; rows of pairs that are neighbours, and biases; queries beside a
    gate. What is planned is what becomes, decoding goes on where the row ended, and undo brings everything back."""
    model, x = host(**DONORS[donor]), torch.arange(7)[None]
    want = model(x)
    made = plan(model, "attention", name)
    said = {e.tensor for e in made.entries if e.action != "dropped"}
    (block,) = made.apply().blocks.values()
    assert said == block.state_dict().keys()
    whole, state = model(x), model.init_state(1, 7)
    assert whole.isfinite().all()
    cut = torch.cat([model(part, state=state) for part in x.split([5, 1, 1], 1)], 1)
    torch.testing.assert_close(cut, whole, rtol=1e-7, atol=1e-7)
    made.undo()
    assert torch.equal(model(x), want)


@pytest.mark.parametrize("features", [16, 6])
def test_the_encoder_of_a_prefix_reads_as_attention_does(features):
    foreign = torch.nn.Sequential(host(**SHARED).get_submodule("layers.0.block"))
    done = replace(foreign, "0", "jrt", prefix_len=4, feature_dim=features)
    block: Any = done.blocks["0"]
    original: Any = done.originals["0"]
    v = original.v_proj.weight.unflatten(0, (2, WIDTH)).repeat_interleave(2, 0).flatten(0, 1)
    assert torch.equal(block.k_e_proj.weight, block.k_proj.weight) and torch.equal(block.v_e_proj.weight, v)
    assert [e.action for e in done.entries if e.tensor == "k_e_proj.weight"] == ["mapped"]


@torch.no_grad()
def test_low_rank_keeps_products():
    """All of them where there is room; else what is lost are the smallest singular values, and no rank does better."""
    q, k = (torch.randn(2 * 6, 20, dtype=torch.float64) for _ in range(2))

    def products(q, k):
        q, k = (t.unflatten(0, (2, -1)) for t in (q, k))
        return torch.einsum("hdi,hdj->hij", q, k) / q.shape[1] ** 0.5

    for rank in (8, 6, 2):
        left, right = low_rank(q, k, 2, rank)
        assert left.shape == right.shape == (2 * rank, 20)
        lost = torch.linalg.svdvals(products(q, k))[:, rank:].norm()
        off = (products(q, k) - products(left, right)).norm()
        torch.testing.assert_close(off, lost, rtol=1e-9, atol=1e-9)


def test_inverses():
    y = torch.tensor([1e-3, 0.5, 20.0], dtype=torch.float64)
    torch.testing.assert_close(F.softplus(inverse_softplus(y)), y)
    torch.testing.assert_close(F.logsigmoid(decay_logit(-y)), -y)


def test_a_linear_mixer_keeps_its_gate():
    trunk = [{"gla": {"num_heads": 2}}, {"attention": {"num_heads": 2}}]
    model = zoo.build({"dim": 32, "vocab_size": 11, "trunk": trunk})
    for old, gated in (("gla", True), ("attention", False)):
        done = replace(model, old, "simple_gla")
        kept = {e.tensor for e in done.entries if e.action == "kept"}
        assert "v_proj.weight" in kept and ("g_proj.weight" in kept) == gated
        (block,) = done.blocks.values()
        assert (block.g_proj is not None) == gated
