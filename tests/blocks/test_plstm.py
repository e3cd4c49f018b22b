"""pLSTM against its recurrence and its operator, and what its mathematics promises."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from zoo.blocks.plstm import ParallelLSTM

DIM, T = 64, 45


def redraw(module: nn.Module) -> nn.Module:
    gen = torch.Generator().manual_seed(0)
    for p in module.parameters():
        with torch.no_grad():
            p.copy_(torch.randn(p.shape, generator=gen, dtype=torch.float64) / p[0].numel() ** 0.5)
    return module.double()


def tokens(seed=1, length=T):
    return torch.randn(2, length, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def parts(block, x):
    """c; q, k [B, T, H, Dk]; v [B, T, H, J, Dv]; gates S, T, M, D [B, T, H, J, J]."""
    H, J = block.num_heads, block.tracking_dim
    c = F.conv1d(F.pad(x.mT, (block.carried, 0)), block.conv.weight, block.conv.bias, groups=DIM).mT
    q, k = (p(c).unflatten(-1, (H, -1)) for p in (block.q_proj, block.k_proj))
    v = block.v_proj(x).unflatten(-1, (H, J, -1))
    S, M, D = (p(c).sigmoid().unflatten(-1, (H, J, J)) for p in (block.source, block.mark, block.direct))
    A = torch.tanh(5 * block.eigenvalues(c)).unflatten(-1, (H, J)).diag_embed()
    if J > 1:
        U, V = (p(c).unflatten(-1, (H, J, J)) for p in (block.outproj, block.inproj))
        A = torch.matrix_exp(U - U.mT) @ A @ torch.matrix_exp(V - V.mT)
    return c, q, k, v, (S, A, M, D)


def finish(block, o, c):
    y = o.flatten(-2)
    y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return block.o_proj(y.flatten(-2) * block.mhnorm.weight) + block.passthrough * c


def recurrence(block, x):
    c, q, k, v, (S, A, M, D) = parts(block, x)
    C, o = torch.zeros(*q.shape[:1], *v.shape[2:4], q.shape[-1], v.shape[-1], dtype=x.dtype), []
    for t in range(x.shape[1]):
        past = torch.einsum("bhjde,bhd->bhje", C, q[:, t])
        here = (q[:, t] * k[:, t]).sum(-1)[..., None, None] * v[:, t]
        o.append((M[:, t] @ past + D[:, t] @ here) * q.shape[-1] ** -0.5)
        C = torch.einsum("bhij,bhjde->bhide", A[:, t], C) + torch.einsum("bhd,bhje->bhjde", k[:, t], S[:, t] @ v[:, t])
    return finish(block, torch.stack(o, 1), c)


@pytest.mark.parametrize("slots", [1, 2, 4])
@pytest.mark.parametrize("bias", [0.0, 1.0])
def test_it_is_the_recurrence_forward_and_backward(slots, bias):
    block = redraw(ParallelLSTM(DIM, num_heads=2, tracking_dim=slots, chunk_size=8))
    x = tokens().requires_grad_()
    with torch.no_grad():
        block.eigenvalues.bias.fill_(bias)  # at 0 half of them are negative
    want, got = recurrence(block, x), block(x)
    torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)
    weight = torch.linspace(-1, 1, want.numel(), dtype=want.dtype).view_as(want)
    leaves = [x, *block.parameters()]
    theirs, ours = (torch.autograd.grad((y * weight).sum(), leaves) for y in (want, got))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-8)


def test_transitions_are_contractions():
    block = redraw(ParallelLSTM(DIM, tracking_dim=4))
    T = block.transitions(5 * tokens())
    assert torch.linalg.matrix_norm(T, ord=2).max() <= 1 + 1e-12


def test_open_gates_give_linear_attention():
    block, x = redraw(ParallelLSTM(DIM, num_heads=4, tracking_dim=1)), tokens()
    with torch.no_grad():
        for gate in (block.source, block.mark, block.direct, block.eigenvalues):
            gate.weight.zero_()
            gate.bias.fill_(50.0)
    c, q, k, v, _ = parts(block, x)
    o = torch.einsum("bihd,bjhd->bhij", q, k).tril() @ v[..., 0, :].transpose(1, 2) * q.shape[-1] ** -0.5
    torch.testing.assert_close(block(x), finish(block, o.transpose(1, 2)[..., None, :], c), atol=1e-11, rtol=1e-11)


def test_a_closed_direct_gate_leaves_only_the_past():
    block, x = redraw(ParallelLSTM(DIM)), tokens(length=1)
    with torch.no_grad():
        block.direct.weight.zero_()
        block.direct.bias.fill_(-200.0)
    torch.testing.assert_close(block(x), block.passthrough * parts(block, x)[0], atol=1e-12, rtol=1e-12)


def test_fresh_slots_learn_different_things():
    """With equal gates for all slots, as the released layer starts, their gradients are equal too."""
    block = ParallelLSTM(DIM, num_heads=2).double()
    block(tokens()).square().sum().backward()
    for gradient in (block.source.bias.grad, block.eigenvalues.bias.grad):
        assert gradient is not None
        first, second = gradient.view(2, 4, -1)[:, :2].unbind(1)
        assert (first - second).norm() > 1e-3 * first.norm()


@pytest.mark.parametrize("slots", [1, 4])
def test_float32_over_many_tokens(slots):
    block, x = redraw(ParallelLSTM(DIM, tracking_dim=slots)), tokens(length=500)
    want = block(x)
    single = ParallelLSTM(DIM, tracking_dim=slots)
    single.load_state_dict({n: p.float() for n, p in block.state_dict().items()})
    assert (single(x.float()) - want).norm() / want.norm() < 1e-5


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="num_heads=5 times tracking_dim=4 must divide"):
        ParallelLSTM(DIM, num_heads=5)
