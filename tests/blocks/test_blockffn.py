"""BlockFFN: closed forms of router, losses and metrics."""

import math

import pytest
import torch
from torch.nn import functional as F

import zoo
from zoo import registry
from zoo.blocks.blockffn import BlockFFN, chunk_sparsity_loss, locality_loss
from zoo.blocks.measure import chunk_level_sparsity

DIM, E, WIDTH = 32, 6, 4
DOCS = torch.tensor([[0] * 7 + [1] * 4 + [2] * 9, [4] * 20])


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def block(**options):
    torch.manual_seed(0)
    given = {"num_experts": E, "expert_dim": WIDTH, "chunk_size": 4} | options
    return registry.create("blockffn", DIM, dtype=torch.float64, **given)


def test_equals_experts_one_by_one():
    ours, x = block().eval(), draw(2, 5, DIM)
    torch.nn.init.normal_(ours.router_norm.weight)
    active = F.relu(x @ ours.router.weight.t())
    a = active / (active.square().mean(-1, keepdim=True) + 1e-6).sqrt() * ours.router_norm.weight
    want = 0
    for e in range(E):
        rows = slice(e * WIDTH, (e + 1) * WIDTH)
        h = F.silu(x @ ours.up_proj.weight[rows].t()) * a[..., e : e + 1]
        want = want + h @ ours.down_proj.weight[:, rows].t()
    torch.testing.assert_close(ours(x), want)


def test_constant_router_is_a_plain_mlp():
    ours, x = block().eval(), draw(2, 5, DIM).abs()
    torch.nn.init.constant_(ours.router.weight, 0.5)  # equal positive logits: a = 1 but for eps
    mlp = registry.create("mlp", DIM, hidden_dim=E * WIDTH, activation="silu", dtype=torch.float64)
    mlp.up_proj, mlp.down_proj = ours.up_proj, ours.down_proj
    torch.testing.assert_close(ours(x), mlp(x), rtol=1e-6, atol=1e-6)


def test_scaling_the_logits_changes_nothing():
    ours, x = block().eval(), draw(2, 5, DIM)
    y = ours(x)
    ours.router.weight.data *= 7.0
    torch.testing.assert_close(ours(x), y, rtol=1e-4, atol=1e-4)


def test_silent_experts_change_nothing_and_the_union_does_not_read_them():
    ours, x = block().eval(), draw(1, 2, DIM)
    y, (_, a) = ours(x), ours._route(x)
    silent = [e for e in range(E) if not a[..., e].any()]
    for value, form in ((1e3, ours), (math.nan, ours.forward_union)):
        for e in silent:
            ours.up_proj.weight.data[e * WIDTH : (e + 1) * WIDTH] = value
        torch.testing.assert_close(form(x), y, rtol=0, atol=1e-12)
    assert silent


def test_union_form():
    ours, x = block().eval(), draw(1, 2, DIM)
    _, a = ours._route(x)
    assert 0 < (a != 0).any(0).any(0).sum() < E
    torch.testing.assert_close(ours.forward_union(x), ours(x), rtol=0, atol=1e-12)
    ours.router.weight.data.zero_()  # nobody is active
    assert ours.forward_union(x).abs().max() == 0 == ours(x).abs().max()


@torch.no_grad()
def test_inference_reads_the_union_of_few_tokens(monkeypatch):
    """A model that is told to in YAML decodes by the union, and prefills and trains by all."""
    model = zoo.build({"dim": 32, "vocab_size": 20, "trunk": [
        ["attention", {"blockffn": {"num_experts": 8, "expert_dim": 8, "chunk_size": 4, "inference": "union"}}]
    ]}).double().eval()  # fmt: skip
    union, calls = BlockFFN.forward_union, []
    monkeypatch.setattr(BlockFFN, "forward_union", lambda self, x: calls.append(x.shape[1]) or union(self, x))
    tokens = torch.arange(12).view(1, 12)
    state, want = model.init_state(1), model(tokens)
    parts = [model(part, state=state) for part in tokens.split([5, 4, 1, 1, 1], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), want, rtol=0, atol=1e-12)
    assert calls == [4, 1, 1, 1]
    assert "blockffn reads all experts" in zoo.estimate(model, batch_size=1, seq_len=1, mode="decode").assumptions


@pytest.mark.parametrize("docs", [None, DOCS])
def test_locality_loss_is_the_cross_entropy_loop(docs):
    z = draw(2, 20, E) * 0.02
    terms = [
        F.binary_cross_entropy_with_logits(100 * z[b, t - 1], torch.sigmoid(100 * z[b, t]))
        for b in range(2)
        for t in range(1, 20)
        if docs is None or docs[b, t] == docs[b, t - 1]
    ]
    torch.testing.assert_close(locality_loss(z, docs), torch.stack(terms).mean())
    assert locality_loss(z[:, :1]) == 0
    same = z[:, :1].sign().expand(-1, 20, -1)
    assert locality_loss(same) < 1e-6 < locality_loss(z)


@pytest.mark.parametrize("docs", [None, DOCS])
@pytest.mark.parametrize("size", [1, 3, 64])
def test_chunk_loss_is_the_union_rate_of_one_hot_patterns(docs, size):
    chosen = torch.randint(E, (2, 20), generator=torch.Generator().manual_seed(1))
    z = F.one_hot(chosen, E).double() * 2 - 1  # one positive logit a token, so p is 0 or 1
    unions = []
    for b in range(2):
        ids = torch.zeros(20, dtype=torch.int64) if docs is None else docs[b]
        for d in ids.unique():
            document = chosen[b][ids == d]
            unions += [len(set(c.tolist())) / E for c in document.split(size)]
    assert chunk_sparsity_loss(z, size, docs).item() == pytest.approx(sum(unions) / len(unions), abs=1e-3)


def test_chunk_loss_of_graded_patterns():
    z = draw(1, 6, E)
    v = F.relu(z) / (F.relu(z).square().mean(-1, keepdim=True) + 1e-6).sqrt()
    p = (v / (v.sum(-1, keepdim=True) + 1e-5))[0]
    want = torch.stack([1 - (1 - c + 1e-5).prod(0).mean() for c in p.split(4)]).mean()
    torch.testing.assert_close(chunk_sparsity_loss(z, 4), want)


def test_chunk_level_sparsity():
    active = draw(2, 20, E) > 0.8
    values = [chunk_level_sparsity(active, n).item() for n in (1, 2, 4, 8, 20, 64)]
    assert values[0] == pytest.approx(1 - active.float().mean().item())
    assert values == sorted(values, reverse=True) and values[-1] == values[-2]
    same = active[:, :1].expand(-1, 20, -1)
    assert chunk_level_sparsity(same, 8) == pytest.approx(chunk_level_sparsity(same, 1).item())
    windows = [active[b, t : t + 4] for b in range(2) for t in range(17) if len(DOCS[b, t : t + 4].unique()) == 1]
    want = sum((~w.any(0)).float().mean().item() for w in windows) / len(windows)
    assert chunk_level_sparsity(active, 4, DOCS).item() == pytest.approx(want)


def test_losses_ride_on_the_output_in_training_only():
    ours, x = block(locality_coef=0.3, sparsity_coef=0.7), draw(2, 20, DIM)
    y = ours.train()(x, doc_ids=DOCS)
    got = torch.autograd.grad(y.sum(), ours.router.weight)[0]
    assert set(ours.metrics) == {"TLS", "CLS8", "CLS4", "locality_loss", "sparsity_loss"}
    assert 0 <= ours.metrics["CLS8"] <= ours.metrics["CLS4"] <= ours.metrics["TLS"] > 0
    z = x @ ours.router.weight.t()
    loss = 0.3 * locality_loss(z, DOCS) + 0.7 * chunk_sparsity_loss(z, 4, DOCS)
    assert 0.3 * ours.metrics["locality_loss"] + 0.7 * ours.metrics["sparsity_loss"] == pytest.approx(loss.item())
    want = torch.autograd.grad(ours.eval()(x).sum() + loss, ours.router.weight)[0]
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(ours(x), y)


def test_parameters_of_the_paper():
    for dim, experts, width, wanted in ((768, 48, 64, 4_755_504), (1792, 56, 128, 25_790_520)):
        paper = registry.create("blockffn", dim, num_experts=experts, expert_dim=width, device="meta")
        assert sum(p.numel() for p in paper.parameters()) == wanted
    assert registry.create("blockffn", 768, device="meta").expert_dim == 64
    assert math.isclose(registry.create("blockffn", 2048, device="meta").expert_dim * 48, 4 * 2048, rel_tol=0.05)
