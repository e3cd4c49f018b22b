"""mamba3 against its recurrence on complex states, token by token in fp64, and at its limits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from zoo.blocks.mamba2 import Mamba2
from zoo.blocks.mamba3 import Mamba3
from zoo.registry import create

DIM, T = 32, 37
DOUBLE = torch.float64


def redraw(module: nn.Module, seed: int = 0) -> nn.Module:
    """Weights of order one, where a fresh layer is nearly silent."""
    gen = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        with torch.no_grad():
            draw = torch.randn(p.shape, generator=gen, dtype=DOUBLE)
            p.copy_(2 * draw / p.shape[-1] ** 0.5 if p.ndim == 2 else 1 + 0.5 * draw)
    return module.double().eval()


def tokens(seed=1, length=T):
    return torch.randn(2, length, DIM, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def rms(x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def complex_recurrence(block: Mamba3, x: torch.Tensor) -> torch.Tensor:
    """S_t = e^{A d - i turn} (S_{t-1} + (1 - l) d b_{t-1} x_{t-1}) + l d b_t x_t and y = Re(c* S) + D x, with pairs of
    B and C as complex numbers b and c that nobody rotates: the turn is in the state, as the paper starts from."""
    E, H, P, N, G, R, S = (
        block.inner, block.num_heads, block.head_dim, block.state_dim, block.num_groups, block.rank, block.num_angles,
    )  # fmt: skip
    z, u, B, C, dt, A, trap, angle = (x @ block.in_proj.weight.T).split([E, E, R * G * N, R * G * N, H, H, H, S], -1)

    def paired(t, norm, bias):
        t = rms(t.reshape(*t.shape[:2], R, G, N)) * norm.weight
        t = t.repeat_interleave(H // G, 3) + bias.transpose(0, 1)  # [B, T, R, H, N]
        if R == 1:
            return torch.complex(t[..., 0::2], t[..., 1::2])
        return torch.complex(t[..., : N // 2], t[..., N // 2 :])

    b, c = paired(B, block.B_norm, block.B_bias), paired(C, block.C_norm, block.C_bias)
    d, lam = F.softplus(dt + block.dt_bias), torch.sigmoid(trap)
    A = -F.softplus(A).clamp(min=1e-4)
    turn = torch.zeros(2, x.shape[1], H, N // 2, dtype=DOUBLE)
    turn[..., :S] = math.pi * torch.tanh(angle)[:, :, None] * d[..., None]
    u, z = u.unflatten(-1, (H, P)), z.unflatten(-1, (H, P))
    ones = torch.ones(H, R, P, dtype=DOUBLE)
    mx, mz, mo = (block.mimo_x, block.mimo_z, block.mimo_o) if R > 1 else (ones, ones, ones)
    inputs = torch.einsum("bthp,hrp->btrhp", u, mx)
    memory, before, rows = torch.zeros(2, H, N // 2, P, dtype=torch.complex128), 0, []
    for t in range(x.shape[1]):
        write = torch.einsum("brhn,brhp->bhnp", b[:, t], inputs[:, t] + 0j)
        step, share = d[:, t, :, None, None], lam[:, t, :, None, None]
        decay = torch.polar((A * d)[:, t, :, None].exp().expand_as(turn[:, t]), -turn[:, t])[..., None]
        memory = decay * (memory + (1 - share) * step * before) + share * step * write
        before = write
        y = torch.einsum("brhn,bhnp->brhp", c[:, t].conj(), memory).real + block.D[:, None] * inputs[:, t]
        if block.norm is not None:
            y = rms(y) * block.norm.weight.view(H, P)
        y = y * F.silu(torch.einsum("bhp,hrp->brhp", z[:, t], mz))
        rows.append(torch.einsum("brhp,hrp->bhp", y, mo).flatten(1))
    return torch.stack(rows, 1) @ block.out_proj.weight.T


OPTIONS = [
    {"head_dim": 16, "state_dim": 8},
    {"head_dim": 32, "state_dim": 12, "rope_fraction": 1.0, "output_norm": True},
    {"head_dim": 16, "state_dim": 8, "num_groups": 2, "mimo_rank": 4},
    {"head_dim": 8, "state_dim": 10, "rope_fraction": 0.7, "mimo_rank": 3, "output_norm": True},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_it_is_the_recurrence_of_complex_states(options):
    block = redraw(Mamba3(DIM, chunk_size=8, **options))
    grads = []
    for layer in (block, lambda x: complex_recurrence(block, x)):
        x = tokens().requires_grad_()
        y = layer(x)
        grads.append((y, *torch.autograd.grad(y.square().sum(), (x, *block.parameters()))))
    torch.testing.assert_close(*grads, atol=1e-9, rtol=1e-9)
    state = block.init_state(2)
    with torch.no_grad():
        pieces = [block(part, state=state) for part in tokens().split([17, 1, 1, 18], 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), grads[1][0], atol=1e-10, rtol=1e-10)


def test_the_end_of_the_trapezoid_without_rotation_is_mamba2():
    """trap -> infinity, no angles, no norm and bias of B and C: one and the same layer, given the same z, x, B, C and
    dt. Of Mamba-2 its convolution is put in front and its norm left out, of Mamba-3 A is made constant."""
    theirs = redraw(Mamba2(DIM, num_heads=4, state_dim=8, num_groups=2))
    ours = redraw(Mamba3(DIM, head_dim=16, state_dim=8, num_groups=2, rope_fraction=0.0))
    theirs.norm.forward = lambda y, z: y * F.silu(z)
    ours.B_norm = ours.C_norm = nn.Identity()

    def projected(x):
        z, xBC, dt = theirs.in_proj(x).split([64, 64 + 32, 4], -1)
        A = torch.log(torch.expm1(theirs.A_log.exp())).expand_as(dt)  # softplus of it is exp(A_log)
        return torch.cat([z, theirs.conv1d(xBC, None, None), dt, A, torch.full_like(dt, 80.0)], -1)

    with torch.no_grad():
        ours.B_bias.zero_()
        ours.C_bias.zero_()
        for name in ("dt_bias", "D", "out_proj.weight"):
            ours.get_parameter(name).copy_(theirs.get_parameter(name))
        want = theirs(tokens())
        ours.in_proj.forward = projected
        torch.testing.assert_close(ours(tokens()), want, atol=1e-11, rtol=1e-11)


def test_one_rank_of_several_is_the_layer_with_one():
    one = redraw(Mamba3(DIM, head_dim=16, state_dim=8, rope_fraction=0.0))
    two = redraw(Mamba3(DIM, head_dim=16, state_dim=8, rope_fraction=0.0, mimo_rank=2))
    with torch.no_grad():
        for p, q in zip((two.mimo_x, two.mimo_z, two.mimo_o), (1, 1, 1), strict=True):
            p.zero_()[:, 0] = q
        rows = torch.cat([torch.arange(s, s + n) for s, n in ((0, 136), (144, 8), (160, 12))])
        two.in_proj.weight[rows] = one.in_proj.weight  # [z x B | B' | C | C' | dt A trap]
        two.B_bias[:, :1], two.C_bias[:, :1] = one.B_bias, one.C_bias
        for name in ("dt_bias", "D", "out_proj.weight", "B_norm.weight", "C_norm.weight"):
            two.get_parameter(name).copy_(one.get_parameter(name))
        torch.testing.assert_close(two(tokens()), one(tokens()), atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("trap", [0.0, 80.0])
def test_the_last_token_enters_again_unless_the_step_is_eulers(trap):
    block = redraw(Mamba3(DIM, head_dim=16, state_dim=8))
    project, outputs = block.in_proj.forward, []
    trap_rows = torch.zeros(block.in_proj.out_features, dtype=torch.bool)
    trap_rows[sum(block.rows[:6]) : sum(block.rows[:7])] = True
    block.in_proj.forward = lambda x: torch.where(trap_rows, trap, project(x))
    with torch.no_grad():
        for forget in (False, True):
            state = block.init_state(2)
            block(tokens(), state=state)
            if forget:
                state.B.zero_()
            outputs.append(block(tokens(2, 1), state=state))
    assert torch.allclose(*outputs, rtol=0, atol=1e-9) == (trap == 80)


def test_angles_stay_exact_over_many_tokens():
    """In fp32 the turns of 20000 tokens add up to thousands of radians, of which only the fraction counts."""
    block = redraw(Mamba3(DIM, head_dim=64, state_dim=8)).float()
    x = tokens(3, 20_000).float()
    with torch.no_grad():
        state, exact = block.init_state(2), block.double().init_state(2)
        block(x.double(), state=exact)
        block.float()(x, state=state)
    gap = (state.angle.double() - exact.angle + math.pi) % (2 * math.pi) - math.pi
    assert gap.abs().max() < 2e-3 and (state.angle >= 0).all() and (state.angle < 6.2832).all()


def test_sizes_and_first_values():
    block = Mamba3(1024, device="meta")  # the published size of one layer
    assert block.in_proj.weight.shape == (4480, 1024) and block.B_bias.shape == (32, 1, 128)
    assert sum(p.numel() for p in block.parameters()) == 6_693_184
    mimo = create("mamba3", 256, head_dim=4, mimo_rank=4)
    assert mimo.mimo_x.shape == (128, 4, 4) and (mimo.mimo_x == 0.25).all() and (mimo.mimo_z == 1).all()
    step = F.softplus(mimo.dt_bias)
    assert 9e-4 < step.min() < 3e-3 and 0.04 < step.max() < 0.11
    assert all((p == 1).all() for p in (mimo.D, mimo.B_bias, mimo.C_bias, mimo.B_norm.weight))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"head_dim": 24}, "head_dim"),
        ({"head_dim": 16, "num_groups": 3}, "num_groups"),
        ({"state_dim": 9}, "state_dim"),
        ({"kernel": "chunkd"}, "chunked"),
    ],
)
def test_it_refuses(options, words):
    with pytest.raises(ValueError, match=words):
        Mamba3(DIM, **options)
