"""hyena against its definition with Toeplitz matrices, written down once more."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from zoo.blocks.hyena import Hyena
from zoo.registry import create

DIM, T = 16, 45
DOUBLE = torch.float64


def redraw(module: nn.Module, seed: int = 0) -> nn.Module:
    """Weights of order one, where a fresh layer is nearly linear in its filters."""
    gen = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        with torch.no_grad():
            p.add_(torch.randn(p.shape, generator=gen, dtype=DOUBLE) / p.shape[-1] ** 0.5)
    return module.double().eval()


def tokens(seed=1):
    return torch.randn(2, T, DIM, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def filters(block: Hyena) -> torch.Tensor:
    """[order - 1, L, D]: sine network of (t, cos, sin), times exp(-t |delta|), as the paper's appendix has it."""
    mlp, L = block.filter_fn.implicit_filter, block.filter_len
    t = torch.linspace(0, 1, L, dtype=DOUBLE)
    bands = (mlp[0].in_features - 1) // 2
    f = torch.linspace(1e-4, bands - 1, bands, dtype=DOUBLE)
    z = torch.exp(-1j * f * (2 * math.pi * torch.arange(L, dtype=DOUBLE) / L)[:, None])
    h = torch.cat([t[:, None], z.real, z.imag], 1)
    for i in (0, 2, 4):
        h = torch.sin(mlp[1].freq * (h @ mlp[i].weight.T + mlp[i].bias))
    h = h @ mlp[6].weight.T
    delta = torch.linspace(math.log(1e-2) / 1.5, math.log(1e-2) / 0.3, h.shape[1], dtype=DOUBLE)
    return (h * torch.exp(-t[:, None] * delta.abs())).unflatten(1, (block.order - 1, DIM)).transpose(0, 1)


def toeplitz(h: torch.Tensor, size: int) -> torch.Tensor:
    """[D, size, size] with h_{t-s} at row t, column s where 0 <= t - s < L."""
    lag = torch.arange(size)[:, None] - torch.arange(size)
    inside = (lag >= 0) & (lag < len(h))
    return torch.where(inside[..., None], h[lag.clamp(0, len(h) - 1)], 0).permute(2, 0, 1)


def definition(block: Hyena, x: torch.Tensor) -> torch.Tensor:
    u = x @ block.in_proj.weight.T + block.in_proj.bias
    taps = block.short_filter.weight[:, 0].flip(1).T
    u = torch.einsum("cts,bsc->btc", toeplitz(taps, x.shape[1]), u) + block.short_filter.bias
    *gates, v = u.split(DIM, -1)
    biases = block.filter_fn.bias.view(-1, DIM)
    for o, i in enumerate(range(block.order - 1, 0, -1)):
        operator = toeplitz(filters(block)[o], x.shape[1]) + torch.diag_embed(biases[o][:, None].expand(-1, x.shape[1]))
        v = torch.einsum("cts,bsc->btc", operator, v * gates[i])
    return (v * gates[0]) @ block.out_proj.weight.T + block.out_proj.bias


OPTIONS = [
    {"filter_len": T},
    {"filter_len": 100, "order": 3, "filter_dim": 8, "emb_dim": 7, "frequency": 5.0},
    {"filter_len": 12, "order": 4, "filter_dim": 8, "conv_size": 5},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_it_is_its_definition(options):
    block = redraw(Hyena(DIM, **options))
    results = []
    for layer in (block, lambda x: definition(block, x)):
        x = tokens().requires_grad_()
        y = layer(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, *block.parameters()))))
    torch.testing.assert_close(*results, atol=1e-9, rtol=1e-9)
    state = block.init_state(2)
    with torch.no_grad():
        pieces = [block(part, state=state) for part in tokens().split([20, 1, 1, 23], 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), results[0][0], atol=1e-10, rtol=1e-10)


def test_a_token_sees_filter_len_tokens():
    block = redraw(Hyena(DIM, filter_len=10, conv_size=1))
    x = tokens()
    changed = x.clone()
    changed[:, 20] += 1
    seen = (block(changed) - block(x)).abs().amax((0, 2))
    assert (seen[20:30] > 1e-6).all() and seen[:20].max() < 1e-12 and seen[30:].max() < 1e-12


def test_names_are_those_of_the_authors():
    """Their checkpoints load by name; places, times and windows, which they store, are computed here."""
    block = Hyena(32, order=3, filter_len=50, device="meta")
    shapes = {name: tuple(t.shape) for name, t in block.state_dict().items()}
    mlp = "filter_fn.implicit_filter"
    assert shapes == {
        "in_proj.weight": (128, 32), "in_proj.bias": (128,), "out_proj.weight": (32, 32), "out_proj.bias": (32,),
        "short_filter.weight": (128, 1, 3), "short_filter.bias": (128,), "filter_fn.bias": (64,),
        f"{mlp}.0.weight": (64, 3), f"{mlp}.0.bias": (64,), f"{mlp}.2.weight": (64, 64), f"{mlp}.2.bias": (64,),
        f"{mlp}.4.weight": (64, 64), f"{mlp}.4.bias": (64,), f"{mlp}.6.weight": (64, 64),
        f"{mlp}.1.freq": (1, 64), f"{mlp}.3.freq": (1, 64), f"{mlp}.5.freq": (1, 64),
    }  # fmt: skip


def test_first_values():
    block = create("hyena", 64, frequency=7.0)
    assert (block.filter_fn.implicit_filter[3].freq == 7).all()
    with torch.no_grad():
        window = block.filter_fn(1024)
    assert window.abs()[-1, 0] < 0.05 * window.abs().max() and window.abs()[400:, -1].max() < 0.01 * window.abs().max()


@pytest.mark.parametrize(
    ("options", "words"), [({"emb_dim": 4}, "emb_dim"), ({"kernel": "ft"}, "fft"), ({"kernel": "native"}, "fft")]
)
def test_it_refuses(options, words):
    with pytest.raises(ValueError, match=words):
        Hyena(DIM, **options)
