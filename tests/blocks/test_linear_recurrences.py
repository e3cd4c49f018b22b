"""Linear-attention and delta-rule mixers against Hugging Face, closed forms and hand-written recurrences."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from zoo.blocks.gated_deltanet import GatedDeltaNet
from zoo.blocks.gla import GatedLinearAttention
from zoo.blocks.lightning import LightningAttention
from zoo.blocks.linear_attention import LinearAttention
from zoo.blocks.recurrent import alibi_slopes, default_heads
from zoo.blocks.retention import Retention

DIM, T = 64, 45


def redraw(module: nn.Module, seed: int = 0) -> nn.Module:
    """Weights of order one, where a fresh layer is nearly silent."""
    gen = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        with torch.no_grad():
            draw = torch.randn(p.shape, generator=gen, dtype=torch.float64)
            p.copy_(draw / p[0].numel() ** 0.5 if p.ndim > 1 else 1 + 0.3 * draw)
    return module.double()


def tokens(seed=1):
    return torch.randn(2, T, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rms(x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


@pytest.mark.parametrize("layer", [0, 1, 3])
def test_lightning_is_minimax(layer):
    from transformers import MiniMaxConfig
    from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

    config = MiniMaxConfig(
        hidden_size=DIM, num_attention_heads=4, head_dim=24, num_hidden_layers=4, block_size=16, hidden_act="silu",
        layer_types=["linear_attention"] * 4,
    )  # fmt: skip
    theirs = redraw(MiniMaxLightningAttention(config, layer))
    for name, value in zip(("query_decay", "key_decay", "diagonal_decay"), theirs.decay_factors(theirs.slope_rate)):
        setattr(theirs, name, value)  # the buffers were rounded to fp32 before the cast
    ours = LightningAttention(DIM, num_heads=4, head_dim=24, layer_index=layer, num_layers=4, chunk_size=8).double()
    missing = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert not missing.missing_keys
    x = tokens()
    want, _ = theirs(x, None, None)
    torch.testing.assert_close(ours(x), want, atol=1e-6, rtol=1e-6)
    state = ours.init_state(2)
    pieces = [ours(part, state=state) for part in x.split([20, 1, 1, 23], 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), ours(x), atol=1e-11, rtol=1e-11)


def test_lightning_schedules():
    like = torch.zeros(1, dtype=torch.float64)
    torch.testing.assert_close(alibi_slopes(4, like), torch.tensor([0.25, 0.0625, 0.015625, 0.00390625]).double())
    six = torch.tensor([0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125]).double()
    torch.testing.assert_close(alibi_slopes(6, like), six)
    paper = LightningAttention(DIM, num_heads=4, schedule="paper", layer_index=1, num_layers=2).log_decay(like)
    torch.testing.assert_close(paper, torch.tensor([0.0, -1.0, -2.0, -3.0]).double())
    last = LightningAttention(DIM, num_heads=4, layer_index=7, num_layers=8).log_decay(like)
    assert (last < 0).all() and last.min() > -1e-4  # the last layer hardly forgets


@pytest.mark.parametrize("negative", [False, True])
def test_gated_deltanet_is_olmo_hybrid(negative):
    from transformers import OlmoHybridConfig
    from transformers.models.olmo_hybrid.modeling_olmo_hybrid import OlmoHybridGatedDeltaNet

    config = OlmoHybridConfig(
        hidden_size=DIM, linear_num_value_heads=6, linear_num_key_heads=6, linear_key_head_dim=8,
        linear_value_head_dim=16, linear_conv_kernel_dim=4, linear_allow_neg_eigval=negative, hidden_act="silu",
        num_hidden_layers=2, num_attention_heads=4, vocab_size=32, layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    theirs = redraw(OlmoHybridGatedDeltaNet(config, 0)).float()
    ours = GatedDeltaNet(DIM, num_heads=6, head_dim=8, expand_v=2.0, allow_neg_eigval=negative, chunk_size=16)
    weights = theirs.state_dict()
    parts = weights.pop("conv1d.weight").split([48, 48, 96])
    weights |= {f"{n}_conv1d.weight": p for n, p in zip("qkv", parts)}
    ours.load_state_dict(weights)
    x = tokens().float()
    torch.testing.assert_close(ours.double()(x.double()).float(), theirs(x), atol=2e-5, rtol=2e-4)


def test_gated_deltanet_is_qwen3_next():
    from transformers import Qwen3NextConfig
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

    H, Hv, D = 2, 6, 8
    config = Qwen3NextConfig(
        hidden_size=DIM, linear_num_value_heads=Hv, linear_num_key_heads=H, linear_key_head_dim=D,
        linear_value_head_dim=D, linear_conv_kernel_dim=4, hidden_act="silu", rms_norm_eps=1e-6,
        num_hidden_layers=1, layer_types=["linear_attention"],
    )  # fmt: skip
    theirs = redraw(Qwen3NextGatedDeltaNet(config, 0)).float()
    w, R = theirs.state_dict(), Hv // H
    qkvz = w["in_proj_qkvz.weight"].view(H, -1, DIM).split([D, D, R * D, R * D], 1)
    ba = w["in_proj_ba.weight"].view(H, -1, DIM).split([R, R], 1)
    conv = w["conv1d.weight"].split([H * D, H * D, Hv * D])
    names = ("q_proj", "k_proj", "v_proj", "g_proj", "b_proj", "a_proj")
    mine = {f"{n}.weight": t.reshape(-1, DIM) for n, t in zip(names, (*qkvz, *ba))}
    mine |= {f"{n}_conv1d.weight": t for n, t in zip("qkv", conv)}
    mine |= {"A_log": w["A_log"], "dt_bias": w["dt_bias"], "o_norm.weight": w["norm.weight"]}
    ours = GatedDeltaNet(DIM, num_heads=H, num_v_heads=Hv, head_dim=D, expand_v=1.0, norm_eps=1e-6, chunk_size=16)
    ours.load_state_dict(mine | {"o_proj.weight": w["out_proj.weight"]})
    x = tokens().float()
    torch.testing.assert_close(ours.double()(x.double()).float(), theirs(x), atol=2e-5, rtol=2e-4)


def test_linear_attention_is_the_quotient_of_sums():
    block = redraw(LinearAttention(DIM, num_heads=4, chunk_size=16))
    x = tokens()
    q, k, v = (p(x).unflatten(-1, (4, 16)) for p in (block.q_proj, block.k_proj, block.v_proj))
    scores = torch.einsum("bihd,bjhd->bhij", F.elu(q) + 1, F.elu(k) + 1).tril()
    o = torch.einsum("bhij,bjhd->bihd", scores, v) / (scores.sum(-1).transpose(1, 2)[..., None] + 1e-6)
    torch.testing.assert_close(block(x), block.o_proj(o.flatten(-2)), atol=1e-11, rtol=1e-11)


def test_linear_attention_refuses_a_signed_normaliser():
    with pytest.raises(ValueError, match="normalize=False"):
        LinearAttention(DIM, feature_map="identity")


def test_gla_is_its_recurrence():
    block, x = redraw(GatedLinearAttention(DIM, gate_logit_normalizer=2.0, chunk_size=16)), tokens()
    q, k = (p(x).unflatten(-1, (4, 8)) for p in (block.q_proj, block.k_proj))
    v = block.v_proj(x).unflatten(-1, (4, 16))
    alpha = (F.logsigmoid(block.gk_proj(x)) / 2).exp().unflatten(-1, (4, 8))
    S, o = torch.zeros(2, 4, 8, 16, dtype=torch.float64), []
    for t in range(T):
        S = alpha[:, t, ..., None] * S + k[:, t, ..., None] * v[:, t, :, None]
        o.append(torch.einsum("bhd,bhde->bhe", q[:, t], S) * 8**-0.5)
    y = rms(torch.stack(o, 1)) * block.o_norm.weight
    want = block.o_proj(y.flatten(-2) * F.silu(block.g_proj(x)))
    torch.testing.assert_close(block(x), want, atol=1e-10, rtol=1e-10)


def test_retention_is_its_parallel_form():
    block, x = redraw(Retention(DIM, num_heads=4, chunk_size=16)), tokens()
    q, k = (p(x).unflatten(-1, (4, 16)) for p in (block.q_proj, block.k_proj))
    v = block.v_proj(x).unflatten(-1, (4, 32))
    n = torch.arange(T, dtype=torch.float64)
    angle = n[:, None] / 10000 ** torch.linspace(0, 1, 8, dtype=torch.float64)
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]
    q, k = (torch.view_as_real(torch.view_as_complex(t.unflatten(-1, (8, 2))) * turn).flatten(-2) for t in (q, k))
    gamma = 1 - 2.0 ** (-5 - torch.arange(4, dtype=torch.float64))
    weight = (gamma[:, None, None] ** (n[:, None] - n).clamp(min=0)).tril()
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / 4 * weight
    y = rms(torch.einsum("bhij,bjhd->bihd", scores, v)) * block.o_norm.weight
    want = block.o_proj(y.flatten(-2) * F.silu(block.g_proj(x)))
    torch.testing.assert_close(block(x), want, atol=1e-10, rtol=1e-10)


def test_retention_follows_the_positions_of_its_tokens():
    block, x = redraw(Retention(DIM, num_heads=4, decay=1.0)), tokens()
    shifted = torch.arange(T).expand(2, -1) + 1000
    torch.testing.assert_close(block(x, positions=shifted), block(x), atol=1e-9, rtol=1e-9)  # only differences count
    stretched = torch.arange(T).expand(2, -1) * 3
    assert (block(x, positions=stretched) - block(x)).abs().max() > 1e-2
    state = block.init_state(2)
    pieces = [block(part, state=state) for part in x.split([7, 1, 37], 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), block(x), atol=1e-11, rtol=1e-11)
    assert state.position.tolist() == [T, T]


def test_initial_decays_of_gated_deltanet():
    torch.manual_seed(0)
    block = GatedDeltaNet(512, num_heads=64)
    block.reset_parameters()
    rate, step = block.A_log.detach().exp(), F.softplus(block.dt_bias.detach())
    assert rate.min() > 0 and rate.max() < 16 and math.isclose(rate.mean().item(), 8, rel_tol=0.3)
    assert step.min() >= 1e-3 * 0.999 and step.max() <= 1e-1 * 1.001


def test_defaults_build_at_every_width():
    assert [default_heads(d) for d in (32, 64, 128, 256, 2048, 30)] == [4, 4, 4, 4, 32, 3]
    for dim in (32, 64, 128, 256, 2048):
        for cls in (LinearAttention, GatedLinearAttention, Retention, LightningAttention, GatedDeltaNet):
            cls(dim, device="meta")


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (GatedLinearAttention, {"num_heads": 5}),
        (Retention, {"num_heads": 64}),
        (Retention, {"num_heads": 5, "rotary": False}),
        (GatedDeltaNet, {"num_heads": 4, "num_v_heads": 6}),
        (LightningAttention, {"layer_index": 3, "num_layers": 3}),
        (LinearAttention, {"kernel": "warp"}),
    ],
)
def test_bad_combinations_are_refused(cls, options):
    with pytest.raises(ValueError, match=r"must|needs|known"):
        cls(DIM, **options)
