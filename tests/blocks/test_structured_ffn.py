"""Structured feed-forward: matrices written out, full rank, self-guided training, merging."""

import math

import pytest
import torch
from torch.nn import functional as F

import zoo
from zoo import registry
from zoo.blocks.structured_ffn import guide_schedule
from zoo.blocks.structured_linear import STRUCTURES, orthogonal_

DIM, HIDDEN, B = 16, 24, 2
ALL = list(STRUCTURES)
X = torch.randn(2, 5, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def block(structure, **options):
    torch.manual_seed(0)
    given = {"hidden_dim": HIDDEN, "blocks": B, "structure": structure} | options
    return registry.create("structured_ffn", DIM, dtype=torch.float64, **given)


def layer(structure, n, m, rank=None, blocks=B, guided=False, device="cpu"):
    torch.manual_seed(0)
    built = STRUCTURES[structure](
        n, m, rank=rank, blocks=blocks, guided=guided, kernel="auto", device=device, dtype=torch.float64
    )
    if device == "cpu":
        built.reset_parameters()
    return built


def written_out(it):
    """The matrix [out, in] of a layer, entry by entry or block by block from its definition."""
    name = next(n for n, c in STRUCTURES.items() if type(it) is c)
    if name == "low_rank":
        return it.lr2.weight @ it.lr1.weight
    if name == "block_dense":
        return it.lr.weight @ torch.block_diag(*it.blkdiag)
    if name == "blast":
        rows = [
            torch.cat([it.u[i] @ torch.diag(it.s[i, j]) @ it.v[j].t() for j in range(len(it.v))], 1)
            for i in range(len(it.u))
        ]
        return torch.cat(rows)
    (k, q, p), (l, s, r) = it.blkdiag1.shape, it.blkdiag2.shape  # noqa: E741
    entries = torch.zeros(s * l, k * p, dtype=torch.float64)
    for lam in range(l):
        for rho in range(r):
            kappa, inner = divmod(rho * l + lam, q)  # the inner feature that place rho of block lam reads
            for sigma in range(s):
                columns = slice(kappa * p, (kappa + 1) * p)
                entries[sigma * l + lam, columns] += it.blkdiag2[lam, sigma, rho] * it.blkdiag1[kappa, inner]
    return entries


def swiglu(x, gate, up, down):
    return (F.silu(x @ gate.t()) * (x @ up.t())) @ down.t()


@pytest.mark.parametrize("structure", ALL)
@torch.no_grad()
def test_is_swiglu_of_the_written_out_matrices(structure):
    ours = block(structure)
    matrices = [written_out(m) for m in (ours.gate_proj, ours.up_proj, ours.down_proj)]
    torch.testing.assert_close(ours(X), swiglu(X, *matrices), rtol=0, atol=1e-12)
    torch.testing.assert_close(ours.down_proj.matrix(), matrices[2], rtol=0, atol=1e-12)
    torch.testing.assert_close(ours.dense()(X), ours(X), rtol=0, atol=1e-12)


@torch.no_grad()
def test_full_rank_is_any_dense_matrix():
    n, m = 8, 12
    wanted = torch.randn(m, n, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    u, s, vh = torch.linalg.svd(wanted, full_matrices=False)
    low = layer("low_rank", n, m, rank=n)
    low.lr1.weight.copy_(s[:, None] * vh)
    low.lr2.weight.copy_(u)
    torch.testing.assert_close(low.matrix(), wanted)

    # Monarch: its block (lam, kappa) is rows lam, lam + b, .. of column block kappa, with rank q / b of its own
    p, rows = n // B, m // B
    full = layer("monarch", n, m, rank=min(p, rows))
    q = full.blkdiag1.shape[1]
    for lam in range(B):
        for kappa in range(B):
            u, s, vh = torch.linalg.svd(wanted[lam::B, kappa * p : (kappa + 1) * p], full_matrices=False)
            # inner features of block kappa that block lam reads: flat index = lam modulo b
            flat = [f for f in range(kappa * q, (kappa + 1) * q) if f % B == lam]
            for i, f in enumerate(flat):
                full.blkdiag1[kappa, f - kappa * q] = s[i] * vh[i]
                full.blkdiag2[lam, :, f // B] = u[:, i]
    torch.testing.assert_close(full.matrix(), wanted)

    # BLAST of rank n: rank j q + i of v picks input i of block j
    exact = layer("blast", n, m, rank=n)
    exact.u.copy_(wanted.view(B, m // B, n))
    exact.s.fill_(1.0)
    exact.v.copy_(torch.stack([torch.eye(n, dtype=torch.float64)[j * p : (j + 1) * p] for j in range(B)]))
    torch.testing.assert_close(exact.matrix(), wanted)


@torch.no_grad()
def test_structures_within_structures():
    blast = layer("blast", 8, 12, rank=3)
    blast.s.fill_(1.0)
    torch.testing.assert_close(blast.matrix(), blast.u.flatten(0, 1) @ blast.v.flatten(0, 1).t())
    assert torch.linalg.matrix_rank(blast.matrix()) == 3
    one = layer("blast", 8, 12, rank=3, blocks=1)
    torch.testing.assert_close(one.matrix(), one.u[0] @ torch.diag(one.s[0, 0]) @ one.v[0].t())
    one = layer("block_dense", 8, 12, rank=4, blocks=1)
    torch.testing.assert_close(one.matrix(), one.lr.weight @ one.blkdiag[0])
    one = layer("block_shuffle", 8, 12, blocks=1)
    torch.testing.assert_close(one.matrix(), one.blkdiag2[0] @ one.blkdiag1[0])


@torch.no_grad()
def test_initial_draws():
    m = layer("low_rank", 16, 24, rank=16)  # all of a dense matrix of variance 1 / in
    assert m.matrix().std().item() == pytest.approx(0.25, rel=0.1)
    torch.testing.assert_close(m.lr1.weight @ m.lr1.weight.t(), m.lr2.weight.t() @ m.lr2.weight, rtol=0, atol=1e-5)
    for shape in ((3, 7, 4), (3, 4, 7), (3, 5, 5)):
        w = torch.empty(shape, dtype=torch.float64)
        orthogonal_(w)
        gram = w.mT @ w if shape[1] >= shape[2] else w @ w.mT
        torch.testing.assert_close(gram, torch.eye(min(shape[1:]), dtype=w.dtype).expand_as(gram), rtol=0, atol=1e-5)
    assert layer("blast", 64, 96, rank=64, blocks=4).matrix().std().item() == pytest.approx(1 / 8, rel=0.15)


@pytest.mark.parametrize(
    "structure, rank, blocks, up, down",
    [
        ("low_rank", 384, 1, 0.625, 0.625),
        ("low_rank", 192, 1, 0.3125, 0.3125),
        ("block_shuffle", None, 2, 0.625, 0.625),
        ("block_shuffle", None, 4, 0.3125, 0.3125),
        ("block_dense", 512, 2, 0.75, 0.5),
        ("block_dense", 256, 2, 0.375, 0.25),
    ],
)
def test_budgets_of_the_paper(structure, rank, blocks, up, down):
    for n, m, share in ((768, 3072, up), (3072, 768, down)):
        it = layer(structure, n, m, rank, blocks, device="meta")
        assert sum(p.numel() for p in it.parameters()) == share * n * m == it.flops(1) / 2


@pytest.mark.parametrize("structure", ALL)
@torch.no_grad()
def test_at_first_the_guide_changes_nothing(structure):
    ours, plain = block(structure, guide=1.0), block(structure)
    y = ours(X)
    torch.testing.assert_close(y, plain(X), rtol=0, atol=1e-12)
    ours.set_guide(0.3)
    torch.testing.assert_close(ours(X), y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("structure", ALL)
def test_guide_mixes_and_parts_the_gradients(structure):
    ours = block(structure, guide=1.0)
    layers = (ours.gate_proj, ours.up_proj, ours.down_proj)
    for i, m in enumerate(layers):
        torch.nn.init.normal_(m.weight, std=0.3, generator=torch.Generator().manual_seed(i))
    for g in (1.0, 0.25, 0.0):
        ours.set_guide(g)
        with torch.no_grad():
            matrices = [g * m.weight + (1 - g) * written_out(m) for m in layers]
            torch.testing.assert_close(ours(X), swiglu(X, *matrices), rtol=0, atol=1e-12)
            torch.testing.assert_close(ours.dense()(X), ours(X), rtol=0, atol=1e-12)
        ours.zero_grad()
        ours(X).square().sum().backward()
        for name, p in ours.named_parameters():
            silent = g == 0 if name.endswith("proj.weight") else g == 1
            assert (p.grad.abs().max() == 0) == silent, (name, g)


@pytest.mark.parametrize("structure", ALL)
@torch.no_grad()
def test_merge_drops_the_guide_and_nothing_else(structure):
    ours = block(structure, guide=0.5)
    torch.nn.init.normal_(ours.up_proj.weight)
    with pytest.raises(ValueError, match="dense companions still count"):
        ours.merge()
    ours.set_guide(0.0)
    y, flops = ours(X), ours.forward_flops(1, 1)
    ours.merge()
    assert torch.equal(ours(X), y)
    assert flops - ours.forward_flops(1, 1) == 6 * DIM * HIDDEN
    plain = block(structure)
    plain.load_state_dict(ours.state_dict())
    assert torch.equal(plain(X), y)
    plain.merge()  # nothing to drop


def test_the_coefficient_is_part_of_a_checkpoint():
    ours, again = block("low_rank", guide=1.0), block("low_rank", guide=1.0)
    ours.set_guide(0.125)
    again.load_state_dict(ours.state_dict())
    assert again.guide.item() == 0.125
    assert [guide_schedule(t, 100) for t in (0, 25, 50, 99)] == pytest.approx([1, 0.5, 0, 0])


def test_the_guide_falls_within_its_steps():
    ours, again = (block("blast", guide=0.8, guide_steps=4) for _ in range(2))
    seen = []
    for _ in range(6):
        ours.after_step()
        seen.append(ours.guide.item())
        again.load_state_dict(ours.state_dict())
        assert int(again.steps_done) == int(ours.steps_done)
    assert seen == pytest.approx([0.8 * (1 + math.cos(math.pi * min(t / 4, 1))) / 2 for t in range(1, 7)])
    assert seen[3:] == [0, 0, 0]


def test_a_merged_model_is_saved_as_it_is(tmp_path):
    ffn = {"structured_ffn": {"structure": "blast", "guide": 1.0, "guide_steps": 3}}
    plain = {"structured_ffn": {"rank": 8}}
    layers = {"guided": ["attention", ffn]}
    model = zoo.build({"dim": 32, "vocab_size": 20, "define": layers, "trunk": [{"repeat": 2, "of": "guided"}, plain]})
    with pytest.raises(ValueError, match="still count 1"):
        model.merge()
    for _ in range(3):
        for module in model.modules():
            if hasattr(module, "after_step"):
                module.after_step()
    tokens = torch.arange(12).view(2, 6)
    want, size = model(tokens), sum(p.numel() for p in model.parameters())
    model.merge()
    model.save_pretrained(tmp_path)
    again = zoo.from_pretrained(tmp_path)
    assert torch.equal(model(tokens), want) and torch.equal(again(tokens), want)
    assert sum(p.numel() for p in again.parameters()) < size
    assert again.config["define"]["guided"][1]["structured_ffn"]["guide"] == 0
    assert again.config["trunk"][1] == plain


@pytest.mark.parametrize(
    "options, words",
    [
        ({"guide_steps": 5}, "lower the guide, which is 0"),
        ({"structure": "toeplitz"}, "structure must be one of low_rank"),
        ({"structure": "block_shuffle", "rank": 4}, "use monarch"),
        ({"structure": "monarch", "blocks": 5}, "blocks=5 must divide dim=16 and hidden_dim=24"),
        ({"structure": "block_dense", "blocks": 4, "rank": 6}, "blocks=4 must divide rank=6"),
        ({"rank": 17}, "rank=17 is more than"),
        ({"kernel": "chunk"}, "did you mean chunked"),
    ],
)
def test_bad_combinations_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        registry.load("structured_ffn")(DIM, hidden_dim=HIDDEN, **options)


def test_coefficients_outside_are_refused():
    with pytest.raises(ValueError, match=r"must be in \[0, 1\], got 2"):
        block("low_rank", guide=1.0).set_guide(2)
    with pytest.raises(ValueError, match="no dense companions"):
        block("low_rank").set_guide(0.5)
