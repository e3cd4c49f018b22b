"""Taylor linear attention, with and without a prefix, against the quotients of sums in the papers."""

from __future__ import annotations

import pytest
import torch

from zoo.blocks.based import Based, taylor_features
from zoo.blocks.jrt import JRT

DIM, T = 64, 45


def tokens(seed=1, length=T):
    return torch.randn(2, length, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def build(cls, **options):
    torch.manual_seed(0)
    return cls(DIM, num_heads=4, feature_dim=6, chunk_size=16, dtype=torch.float64, **options)


def heads(projection, x):
    return projection(x).unflatten(-1, (4, -1))


def paper_features(x):
    """The paper's map, all products kept: 1 + d + d^2 features."""
    d = x.shape[-1]
    outer = (x[..., :, None] * x[..., None, :]).flatten(-2)
    return torch.cat([torch.ones_like(x[..., :1]), x / d**0.25, outer / (2 * d) ** 0.5], -1)


def test_features_are_the_taylor_series():
    q, k = torch.randn(2, 7, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    s = (q * k).sum(-1) / 4
    assert taylor_features(q).shape[-1] == 153 and paper_features(q).shape[-1] == 273
    for phi in (taylor_features, paper_features):
        torch.testing.assert_close((phi(q) * phi(k)).sum(-1), 1 + s + s * s / 2, atol=1e-12, rtol=1e-12)


def test_based_is_the_recurrence_of_the_paper():
    block, x = build(Based), tokens()
    q, k, v = heads(block.q_proj, x), heads(block.k_proj, x), heads(block.v_proj, x)
    q, k = paper_features(q), paper_features(k)
    S = torch.zeros(2, 4, q.shape[-1], v.shape[-1], dtype=torch.float64)
    z, outputs = torch.zeros_like(S[..., 0]), []
    for t in range(T):
        S = S + k[:, t, ..., None] * v[:, t, :, None]
        z = z + k[:, t]
        numerator = torch.einsum("bhf,bhfd->bhd", q[:, t], S)
        outputs.append(numerator / ((q[:, t] * z).sum(-1, keepdim=True) + 1e-12))
    want = block.o_proj(torch.stack(outputs, 1).flatten(2))
    torch.testing.assert_close(block(x), want, atol=1e-11, rtol=1e-11)


def test_the_state_is_that_of_the_paper_without_duplicates():
    block = Based(1024, num_heads=16, device="meta")
    assert block.state_bytes(1, 1) == 16 * 153 * 65 * 4
    assert sum(p.numel() for p in block.parameters()) == 2 * 256 * 1024 + 2 * 1024 * 1024


@torch.no_grad()
def test_near_softmax_for_small_scores():
    """exp(s) = 1 + s + s^2/2 + O(s^3), so q an eighth as large is 512 times nearer to softmax."""
    block, x = build(Based), tokens()
    gaps = []
    for _ in range(2):
        block.q_proj.weight *= 0.125
        q, k, v = heads(block.q_proj, x), heads(block.k_proj, x), heads(block.v_proj, x)
        s = torch.einsum("bihd,bjhd->bhij", q, k) / 6**0.5
        p = s.masked_fill(~torch.ones(T, T, dtype=torch.bool).tril(), float("-inf")).softmax(-1)
        want = block.o_proj(torch.einsum("bhij,bjhd->bihd", p, v).flatten(2))
        gaps.append((block(x) - want).abs().max())
    assert (gaps[0] / gaps[1]).item() == pytest.approx(8**3, rel=0.3)


def prefix_quotient(block, x):
    """The paper's equation: all pairs, prefix pairs without a mask."""
    q, k, v, k_e, v_e = (heads(p, x) for p in (block.q_proj, block.k_proj, block.v_proj, *block.encoder()))
    q, k, k_e = paper_features(q), paper_features(k), paper_features(k_e)
    causal = torch.einsum("bihf,bjhf->bhij", q, k).tril()
    prefix = torch.einsum("bihf,bjhf->bhij", q, k_e)[..., : block.prefix_len]
    numerator = torch.einsum("bhij,bjhd->bihd", causal, v)
    numerator = numerator + torch.einsum("bhij,bjhd->bihd", prefix, v_e[:, : block.prefix_len])
    denominator = (causal.sum(-1) + prefix.sum(-1)).transpose(1, 2)[..., None]
    return block.o_proj((numerator / denominator).flatten(2))


@pytest.mark.parametrize("prefix_len", [1, 20, 100])
def test_jrt_is_the_quotient_of_the_paper(prefix_len):
    block, x = build(JRT, prefix_len=prefix_len), tokens()
    torch.testing.assert_close(block(x), prefix_quotient(block, x), atol=1e-11, rtol=1e-11)


def test_jrt_documents_have_their_own_prefix():
    block, x = build(JRT, prefix_len=7), tokens()
    ids = torch.tensor([[5] * 3 + [2] * 30 + [9] * 12, [1] * 45])
    alone = torch.cat([prefix_quotient(block, part) for part in x[:1].split([3, 30, 12], 1)], 1)
    want = torch.cat([alone, prefix_quotient(block, x[1:])])
    torch.testing.assert_close(block(x, doc_ids=ids), want, atol=1e-11, rtol=1e-11)


def test_jrt_streams_once_its_prefix_is_in():
    block, x = build(JRT, prefix_len=12), tokens()
    want = block(x)
    for cut in ([45], [12, 33], [12] + [1] * 33, [20, 1, 7, 17]):
        state = block.init_state(2)
        got = torch.cat([block(part, state=state) for part in x.split(cut, 1)], 1)
        torch.testing.assert_close(got, want, atol=1e-11, rtol=1e-11)
    assert block.state_bytes(2, T) == state.nbytes


def test_jrt_rows_start_apart():
    """A row that starts beside one that goes on encodes its own prefix; a short prompt is all prefix."""
    block, x = build(JRT, prefix_len=12), tokens()
    state = block.init_state(2)
    block(x[:, :20], state=state)
    state.reset(torch.tensor([1]))
    got = block(x[:, 20:], state=state)
    torch.testing.assert_close(got[:1], block(x[:1])[:, 20:], atol=1e-11, rtol=1e-11)
    torch.testing.assert_close(got[1:], block(x[1:, 20:]), atol=1e-11, rtol=1e-11)
    short = build(JRT, prefix_len=5)
    short.load_state_dict(block.state_dict())
    state = block.init_state(2)
    got = torch.cat([block(part, state=state) for part in x.split([5, 40], 1)], 1)
    torch.testing.assert_close(got, short(x), atol=1e-11, rtol=1e-11)


def test_jrt_is_causal_behind_its_prefix():
    block, x = build(JRT, prefix_len=12), tokens()
    other = torch.cat([x[:, :30], tokens(2)[:, 30:]], 1)
    torch.testing.assert_close(block(other)[:, :30], block(x)[:, :30], atol=1e-12, rtol=0)
    early = torch.cat([x[:, :11], tokens(2)[:, 11:]], 1)
    assert (block(early)[:, :11] - block(x)[:, :11]).abs().min() > 0  # the prefix sees all of itself


@torch.no_grad()
def test_jrt_flops_are_counted_ones():
    from torch.utils.flop_counter import FlopCounterMode

    block, x = build(JRT, prefix_len=12), tokens()
    state = block.init_state(2)
    for part, context in ((x[:, :20], 0), (x[:, 20:21], 20), (x[:, 21:], 21)):
        with FlopCounterMode(display=False) as counter:
            block(part, state=state)
        assert counter.get_total_flops() == block.forward_flops(2, part.shape[1], context, True)
