"""mamba, mamba2 and diag_ssm against Hugging Face, hand-written recurrences and each other."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import zoo
from zoo.blocks.diag_ssm import DiagonalSSM
from zoo.blocks.mamba import Mamba
from zoo.blocks.mamba2 import Mamba2
from zoo.registry import create

DIM, T = 32, 45
CUTS = [20, 1, 1, 23]


def redraw(module: nn.Module, seed: int = 0) -> nn.Module:
    """Weights of order one, where a fresh layer is nearly silent."""
    gen = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        with torch.no_grad():
            draw = torch.randn(p.shape, generator=gen, dtype=torch.float64)
            p.copy_(draw / p[0].numel() ** 0.5 if p.ndim > 1 else 1 + 0.3 * draw)
    return module.double().eval()


def tokens(seed=1):
    return torch.randn(2, T, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def check_against(ours: nn.Module, theirs: nn.Module) -> None:
    """Every weight by its own name; equal outputs and input gradients; equal streams in any cut."""
    ours = ours.double()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    grads = []
    for layer in (ours, theirs):
        x = tokens().requires_grad_()
        y = layer(x)
        grads.append((y, *torch.autograd.grad(y.square().sum(), x)))
    for got, want in zip(*grads):
        assert (got - want).norm() / want.norm() < 2e-6  # theirs works in fp32 inside
    state = ours.init_state(2)
    with torch.no_grad():
        pieces = [ours(part, state=state) for part in tokens().split(CUTS, 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), ours(tokens()), atol=1e-10, rtol=1e-10)


def test_mamba_is_that_of_hugging_face():
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    config = MambaConfig(hidden_size=DIM, state_size=8, conv_kernel=3, time_step_rank=5, num_hidden_layers=1)
    check_against(Mamba(DIM, state_dim=8, conv_size=3, dt_rank=5), redraw(MambaMixer(config, 0)))


def test_mamba_with_norms_is_that_of_jamba():
    from transformers import JambaConfig
    from transformers.models.jamba.modeling_jamba import JambaMambaMixer

    config = JambaConfig(hidden_size=DIM, mamba_d_state=8, mamba_dt_rank=5, num_hidden_layers=1)
    check_against(Mamba(DIM, state_dim=8, dt_rank=5, bcdt_norm=True), redraw(JambaMambaMixer(config, 0)))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("limit", [None, (0.2, 1.5)])
def test_mamba2_is_that_of_hugging_face(groups, limit):
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    config = Mamba2Config(
        hidden_size=DIM, num_heads=4, head_dim=16, state_size=8, n_groups=groups, chunk_size=16, num_hidden_layers=1,
        time_step_limit=limit or (0.0, math.inf),
    )  # fmt: skip
    theirs = redraw(Mamba2Mixer(config, 0))
    ours = Mamba2(DIM, num_heads=4, state_dim=8, num_groups=groups, chunk_size=8, time_step_limit=limit)
    check_against(ours, theirs)


def test_mamba2_is_the_recurrence_of_the_paper():
    block = redraw(Mamba2(DIM, num_heads=2, state_dim=8))
    x, E, N, H = tokens(), 64, 8, 2
    z, xBC, dt = block.in_proj(x).split([E, E + 2 * N, H], -1)
    xBC = F.silu(F.conv1d(F.pad(xBC.mT, (3, 0)), block.conv1d.weight, block.conv1d.bias, groups=E + 2 * N).mT)
    u, B, C = xBC[..., :E].unflatten(-1, (H, -1)), xBC[..., E : E + N], xBC[..., E + N :]
    dt = F.softplus(dt + block.dt_bias)
    S, rows = 0, []
    for t in range(T):
        decay = torch.exp(-block.A_log.exp() * dt[:, t])[..., None, None]
        S = decay * S + torch.einsum("bn,bhp->bhnp", B[:, t], dt[:, t, :, None] * u[:, t])
        rows.append((torch.einsum("bhnp,bn->bhp", S, C[:, t]) + block.D[:, None] * u[:, t]).flatten(1))
    y = torch.stack(rows, 1) * F.silu(z)
    y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * block.norm.weight
    torch.testing.assert_close(block(x), block.out_proj(y), atol=1e-10, rtol=1e-10)


def test_mamba2_multipliers_are_those_of_the_rows_of_in_proj():
    options = {"expand": 1.5, "num_heads": 3, "state_dim": 8, "gated_norm": False}
    scales = (0.5, 0.4, 0.3, 0.7, 0.6)
    plain, scaled = redraw(Mamba2(DIM, **options)), redraw(Mamba2(DIM, multipliers=scales, **options))
    with torch.no_grad():
        rows = plain.in_proj.weight.split([48, 48, 8, 8, 3])  # z, x, B, C, dt
        plain.in_proj.weight.copy_(torch.cat([m * w for m, w in zip(scales, rows, strict=True)]))
    torch.testing.assert_close(scaled(tokens()), plain(tokens()), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("readout", ["pre", "post"])
def test_diag_ssm_is_its_recurrence(readout):
    block = redraw(DiagonalSSM(DIM, readout=readout))
    x = tokens()
    delta, B, C, U = block.param_proj(x).chunk(4, -1)
    alpha = torch.exp(-F.softplus(delta) * block.log_lambda.exp())
    s, rows = torch.zeros(2, DIM, dtype=torch.float64), []
    for t in range(T):
        after = alpha[:, t] * s + B[:, t] * U[:, t]
        rows.append(C[:, t] * (s if readout == "pre" else after))
        s = after
    torch.testing.assert_close(block(x), torch.stack(rows, 1) + block.skip_proj(x), atol=1e-11, rtol=1e-11)


def test_diag_ssm_without_forgetting_counts():
    block = redraw(DiagonalSSM(DIM, readout="post"))
    with torch.no_grad():
        block.log_lambda.fill_(-math.inf)  # alpha = 1
    x = tokens()
    _, B, C, U = block.param_proj(x).chunk(4, -1)
    torch.testing.assert_close(block(x), C * (B * U).cumsum(1) + block.skip_proj(x), atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("dim", [32, 256])
def test_diag_ssm_parameters(dim):
    assert sum(p.numel() for p in DiagonalSSM(dim, device="meta").parameters()) == 5 * dim**2 + dim


@pytest.mark.parametrize("dim", [64, 256])
def test_diag_ssm_starts_with_a_state_of_order_one(dim):
    block = create("diag_ssm", dim)
    state = block.init_state(4)
    block(torch.randn(4, 2000, dim), state=state)
    assert 0.5 < state.s.std() < 4 and state.s.abs().max() < 30


LAYERS = {
    "mamba": lambda: Mamba(DIM, state_dim=4),
    "mamba2": lambda: Mamba2(DIM, num_heads=4, state_dim=8, chunk_size=16),
    "diag_pre": lambda: DiagonalSSM(DIM),
    "diag_post": lambda: DiagonalSSM(DIM, readout="post"),
}


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_packed_documents_are_alone(make):
    block, lengths = redraw(make()), [7, 1, 20, 17]
    ids = torch.repeat_interleave(torch.tensor([5, 2, 9, 3]), torch.tensor(lengths)).expand(2, T)
    results = []
    for packed in (True, False):
        x = tokens().requires_grad_()
        y = block(x, doc_ids=ids) if packed else torch.cat([block(part) for part in x.split(lengths, 1)], 1)
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, *block.parameters()))))
    torch.testing.assert_close(*results, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_states_can_be_reordered_and_trained_segment_by_segment(make):
    block, x = redraw(make()), tokens()
    state = block.init_state(2)
    for part in x[:, :30].split(10, 1):  # every segment has its own graph
        block(part, state=state).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in block.parameters())
    state.reorder(torch.tensor([1, 1]))
    with torch.no_grad():
        got = block(x[1:, 30:].expand(2, -1, -1), state=state)
        torch.testing.assert_close(got, block(x)[1:, 30:].expand(2, -1, -1), atol=1e-10, rtol=1e-10)


def test_initial_step_sizes_and_decays():
    mamba, mamba2 = create("mamba", 256), create("mamba2", 256, head_dim=4)
    assert torch.equal(mamba.A_log, torch.arange(1, 17).log().expand(512, -1))
    assert (mamba2.A_log.exp() >= 1 - 1e-6).all() and (mamba2.A_log.exp() <= 16 + 1e-4).all()
    for bias in (mamba.dt_proj.bias, mamba2.dt_bias):
        step = F.softplus(bias)
        assert 9e-4 < step.min() < 3e-3 and 0.04 < step.max() < 0.11
    assert (mamba.D == 1).all() and (mamba2.D == 1).all()


def test_sizes_of_the_published_models():
    assert sum(p.numel() for p in Mamba(1024, device="meta").parameters()) == 6_666_240
    assert sum(p.numel() for p in Mamba2(1024, device="meta").parameters()) == 6_600_032
    assert Mamba2(2048, num_heads=64, state_dim=128, device="meta").head_dim == 64
    assert [Mamba2(d, device="meta").num_heads for d in (24, 32, 64, 128, 256, 2048)] == [3, 1, 2, 4, 8, 64]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_heads": 3}, "num_heads"),
        ({"num_heads": 4, "head_dim": 8}, "head_dim"),
        ({"head_dim": 24}, "head_dim"),
        ({"num_heads": 4, "num_groups": 3}, "num_groups"),
        ({"time_step_limit": (0.1, 0.01)}, "time_step_limit"),
        ({"time_step_limit": (0.1,)}, "time_step_limit"),
        ({"expand": 1.3}, "no whole number"),
        ({"multipliers": (1.0, 2.0)}, "five numbers"),
        ({"kernel": "chunkd"}, "chunked"),
    ],
)
def test_mamba2_refuses(options, words):
    with pytest.raises(ValueError, match=words):
        Mamba2(DIM, **options)


def test_a_model_leaves_the_options_of_its_blocks_alone():
    """`readout` is also the name of what the model gives to a router that asks the head."""
    made = {
        name: zoo.build({"dim": 32, "vocab_size": 17, "trunk": [{"diag_ssm": {"readout": name}}]}, dtype=torch.float64)
        for name in ("pre", "post")
    }
    made["post"].load_state_dict(made["pre"].state_dict())
    tokens = torch.arange(8)[None]
    for name, model in made.items():
        assert next(m.readout for m in model.modules() if hasattr(m, "readout")) == name
    assert not torch.allclose(made["pre"](tokens), made["post"](tokens))
