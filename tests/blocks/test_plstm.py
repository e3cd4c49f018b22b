"""pLSTM against its recurrence and its operator, and what its mathematics promises."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from zoo.blocks.plstm import ParallelLSTM, signed_decay

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
    """c, q, k, v [B, T, H, D/H] and the gates S, T, M, D [B, T, H]."""
    c = F.conv1d(F.pad(x.mT, (block.width, 0)), block.conv.weight, block.conv.bias, groups=DIM).mT
    q, k, v = (p(z).unflatten(-1, (block.num_heads, -1)) for p, z in zip(block.projections(), (c, c, x)))
    S, M, D = (p(c).sigmoid() for p in (block.source, block.mark, block.direct))
    return c, q, k, v, (S, torch.tanh(5 * block.transition(c)), M, D)


def finish(block, o, c):
    y = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return block.o_proj(y.flatten(-2) * block.mhnorm.weight) + block.passthrough * c


def recurrence(block, x):
    c, q, k, v, (S, A, M, D) = parts(block, x)
    C, o = torch.zeros(*q.shape[:1], *q.shape[2:], v.shape[-1], dtype=x.dtype), []
    for t in range(x.shape[1]):
        past = torch.einsum("bhde,bhd->bhe", C, q[:, t])
        here = (q[:, t] * k[:, t]).sum(-1, keepdim=True) * v[:, t]
        o.append((M[:, t, :, None] * past + D[:, t, :, None] * here) * q.shape[-1] ** -0.5)
        C = A[:, t, :, None, None] * C + S[:, t, :, None, None] * k[:, t, ..., None] * v[:, t, :, None]
    return finish(block, torch.stack(o, 1), c)


@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize("bias", [0.0, 1.0])
def test_it_is_the_recurrence_forward_and_backward(heads, bias):
    block, x = redraw(ParallelLSTM(DIM, num_heads=heads, chunk_size=16)), tokens().requires_grad_()
    with torch.no_grad():
        block.transition.bias.fill_(bias)  # at 0 half of the transitions are negative
    want, got = recurrence(block, x), block(x)
    torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)
    weight = torch.linspace(-1, 1, want.numel(), dtype=want.dtype).view_as(want)
    leaves = [x, *block.parameters()]
    theirs, ours = (torch.autograd.grad((y * weight).sum(), leaves) for y in (want, got))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-8)


def test_it_is_its_operator():
    """Strictly lower M_i (prod T) S_j (q_i . k_j), and D_i (q_i . k_i) on the diagonal."""
    block, x = redraw(ParallelLSTM(DIM, num_heads=4)), tokens(length=12)
    c, q, k, v, (S, A, M, D) = parts(block, x)
    W = torch.zeros(2, 4, 12, 12, dtype=x.dtype)
    for i in range(12):
        W[:, :, i, i] = D[:, i]
        for j in range(i):
            W[:, :, i, j] = M[:, i] * A[:, j + 1 : i].prod(1) * S[:, j]
    o = torch.einsum("bhij,bihd,bjhd,bjhe->bihe", W, q, k, v) * q.shape[-1] ** -0.5
    torch.testing.assert_close(block(x), finish(block, o, c), atol=1e-11, rtol=1e-11)


def test_open_gates_give_linear_attention():
    block, x = redraw(ParallelLSTM(DIM, num_heads=4)), tokens()
    with torch.no_grad():
        for gate in block.gates():
            gate.weight.zero_()
            gate.bias.fill_(50.0)
    c, q, k, v, _ = parts(block, x)
    o = torch.einsum("bihd,bjhd->bhij", q, k).tril() @ v.transpose(1, 2) * q.shape[-1] ** -0.5
    torch.testing.assert_close(block(x), finish(block, o.transpose(1, 2), c), atol=1e-11, rtol=1e-11)


def test_a_closed_direct_gate_leaves_only_the_past():
    block, x = redraw(ParallelLSTM(DIM)), tokens(length=1)
    with torch.no_grad():
        block.direct.weight.zero_()
        block.direct.bias.fill_(-200.0)
    torch.testing.assert_close(block(x), block.passthrough * parts(block, x)[0], atol=1e-12, rtol=1e-12)


def test_signed_decay():
    u = torch.tensor([3e-9, -1e-3, 0.4, -2.0, 5.0, -30.0], dtype=torch.float64)[None, :, None].requires_grad_()
    log_size, sign = signed_decay(u)
    torch.testing.assert_close(log_size.exp(), u.tanh().abs(), atol=1e-15, rtol=1e-12)
    assert sign.flatten().tolist() == [1, -1, -1, 1, 1, -1]
    want = 1 - u.detach().tanh() ** 2  # d tanh
    (gradient,) = torch.autograd.grad((log_size.exp() * u.sign().detach()).sum(), u)
    torch.testing.assert_close(gradient, want, atol=1e-15, rtol=1e-6)
    still = torch.zeros(1, 3, 1, requires_grad=True)
    log_size, _ = signed_decay(still)
    log_size.sum().backward()
    assert log_size.isfinite().all() and still.grad.isfinite().all()


def test_float32_over_many_tokens():
    block, x = redraw(ParallelLSTM(DIM)), tokens(length=1000)
    want = block(x)
    single = ParallelLSTM(DIM)
    single.load_state_dict({n: p.float() for n, p in block.state_dict().items()})
    assert (single(x.float()) - want).norm() / want.norm() < 5e-6


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="num_heads=5 must divide"):
        ParallelLSTM(DIM, num_heads=5)
