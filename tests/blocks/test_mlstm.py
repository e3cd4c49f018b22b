"""mLSTM against its recurrence in true units, the released layer of xLSTM-7B, and what its mathematics promises."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from zoo.blocks.linear_attention import LinearAttention
from zoo.blocks.mlstm import MatrixLSTM, document_starts, soft_cap, stabiliser

DIM, T = 64, 48


def redraw(module: nn.Module, seed: int = 0, gates: float = 1.0) -> nn.Module:
    """Weights of order one, where a fresh layer is nearly silent."""
    gen = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        with torch.no_grad():
            draw = torch.randn(p.shape, generator=gen, dtype=torch.float64)
            p.copy_(draw / p[0].numel() ** 0.5 if p.ndim > 1 else 1 + 0.3 * draw)
            if name.startswith(("igate", "fgate")):
                p.mul_(gates)
    return module.double()


def tokens(seed=1, length=T):
    return torch.randn(2, length, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gates_of(block, x):
    log_i = soft_cap(block.igate_preact(x), block.gate_soft_cap)
    return log_i, F.logsigmoid(soft_cap(block.fgate_preact(x), block.gate_soft_cap))


def head_norm(h, eps=1e-6):
    return (h - h.mean(-1, keepdim=True)) / (h.var(-1, unbiased=False, keepdim=True) + eps).sqrt()


def recurrence(block, x):
    """The paper's equations with i = exp(.) as it stands: no stabiliser, no 1e-6."""
    q, k, v = (p(x).unflatten(-1, (block.num_heads, -1)) for p in (block.q, block.k, block.v))
    i, f = (g.exp() for g in gates_of(block, x))
    C = torch.zeros(*q.shape[:1], *q.shape[2:], v.shape[-1], dtype=x.dtype)
    n, h = C[..., 0], []
    for t in range(x.shape[1]):
        f_t, i_t = f[:, t, :, None], i[:, t, :, None]
        C = f_t[..., None] * C + (i_t * k[:, t])[..., None] * v[:, t, :, None]
        n = f_t * n + i_t * k[:, t]
        q_t = q[:, t] * q.shape[-1] ** -0.5
        below = (n * q_t).sum(-1, keepdim=True).abs().clamp(min=1)
        h.append((C * q_t[..., None]).sum(-2) / below)
    h = head_norm(torch.stack(h, 1)).flatten(-2) * block.multihead_norm.weight
    return block.out_proj(block.ogate_preact(x).sigmoid() * h)


@pytest.mark.parametrize("cap", [15.0, None])
def test_it_is_the_recurrence_in_true_units(cap):
    block, x = redraw(MatrixLSTM(DIM, gate_soft_cap=cap, chunk_size=16)), tokens()
    torch.testing.assert_close(block(x), recurrence(block, x), atol=2e-5, rtol=2e-5)  # they differ by the 1e-6
    block.eps = 0.0
    torch.testing.assert_close(block(x), recurrence(block, x), atol=1e-10, rtol=1e-10)


def released(gates, **options):
    from transformers import xLSTMConfig
    from transformers.models.xlstm.modeling_xlstm import xLSTMLayer

    config = xLSTMConfig(
        hidden_size=DIM, num_heads=4, num_hidden_layers=1, vocab_size=32, chunk_size=16, mode="train",
        norm_reduction_force_float32=False, **options,
    )  # fmt: skip
    return redraw(xLSTMLayer(config), gates=gates)


@pytest.mark.parametrize("gates", [1.0, 8.0])
@pytest.mark.parametrize("factors", [(0.5, 1.0), (1.0, 0.5)])
def test_it_is_the_released_layer_forward_and_backward(gates, factors):
    shape = {"qk_dim_factor": factors[0], "v_dim_factor": factors[1]}
    theirs = released(gates, **shape)
    ours = MatrixLSTM(DIM, num_heads=4, chunk_size=24, **shape).double()
    ours.load_state_dict(theirs.state_dict())
    x = tokens()
    want, (C, n, m) = theirs(x)
    got = ours(x)
    torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)
    state = ours.init_state(2)
    pieces = [ours(part, state=state) for part in x.split([20, 1, 1, 26], 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), want, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(state.memory, torch.cat([C, n[..., None]], -1), atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(state.m, m[..., 0], atol=1e-10, rtol=1e-10)
    weight = torch.linspace(-1, 1, want.numel(), dtype=want.dtype).view_as(want)
    (want * weight).sum().backward()
    (got * weight).sum().backward()
    for name, p in theirs.named_parameters():  # theirs follows the 1e-6 through m, ours does not
        error = (ours.get_parameter(name).grad - p.grad).norm() / p.grad.norm()
        assert error < 1e-4, (name, error)


def test_stabiliser_is_its_recursion():
    gen = torch.Generator().manual_seed(0)
    log_f = F.logsigmoid(3 * torch.randn(2, 45, 3, generator=gen, dtype=torch.float64))
    log_i = 5 * torch.randn(2, 45, 3, generator=gen, dtype=torch.float64)
    ids = torch.repeat_interleave(torch.arange(4), torch.tensor([1, 20, 4, 20])).expand(2, -1)
    for doc_ids, before in ((None, torch.randn(2, 3, generator=gen, dtype=torch.float64)), (ids, torch.zeros(2, 3))):
        m, want = before.to(log_i), []
        for t in range(45):
            if doc_ids is not None and (t == 0 or doc_ids[0, t] != doc_ids[0, t - 1]):
                m = before.to(log_i)
            m = torch.maximum(log_f[:, t] + m, log_i[:, t])
            want.append(m)
        got, _ = stabiliser(log_f, log_i, before.to(log_i)[:, None], document_starts(doc_ids, log_i))
        torch.testing.assert_close(got, torch.stack(want, 1), atol=1e-13, rtol=1e-13)


def test_output_does_not_depend_on_the_stabiliser():
    block, x = redraw(MatrixLSTM(DIM)), tokens()
    block.eps = 0.0
    first, second = block.init_state(2), block.init_state(2)
    second.m.fill_(7.0)  # an empty memory is empty in any units
    torch.testing.assert_close(block(x, state=first), block(x, state=second), atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("gates", [1.0, 5.0, 15.0])
def test_strong_gates_are_finite_and_exact_in_float32(gates):
    x = tokens(length=300)
    double = redraw(MatrixLSTM(DIM, gate_soft_cap=None), gates=gates)
    want = double(x)
    single = MatrixLSTM(DIM, gate_soft_cap=None)
    single.load_state_dict({n: p.float() for n, p in double.state_dict().items()})
    for backend in ("chunked", "auto"):
        single.kernel = backend
        single.zero_grad()
        got = single(x.float())
        assert (got - want).norm() / want.norm() < 5e-5
        got.square().sum().backward()
        assert all(p.grad.isfinite().all() for p in single.parameters())


def test_a_long_sequence_loses_no_precision():
    """Log forget gates sum to -10^5 over these tokens, where float32 has steps of 10^-2."""
    gen = torch.Generator().manual_seed(0)
    log_f, log_i = -12 * torch.rand(1, 20000, 1, generator=gen), 4 * torch.randn(1, 20000, 1, generator=gen)
    before, starts = torch.zeros(1, 1), document_starts(None, log_i)
    m, _ = stabiliser(log_f, log_i, before[:, None], starts)
    want, _ = stabiliser(log_f.double(), log_i.double(), before[:, None].double(), starts)
    assert (m - want).abs().max() < 1e-5


def test_open_gates_give_linear_attention_with_a_bounded_denominator():
    block, x = redraw(MatrixLSTM(DIM, num_heads=4, qk_dim_factor=1.0, gate_soft_cap=None)), tokens()
    plain = redraw(LinearAttention(DIM, num_heads=4, head_dim=16, feature_map="identity", normalize=False))
    with torch.no_grad():
        for gate, bias in ((block.igate_preact, 0.0), (block.fgate_preact, 60.0)):
            gate.weight.zero_()
            gate.bias.fill_(bias)
        for mine, other in ((plain.q_proj, block.q), (plain.k_proj, block.k), (plain.v_proj, block.v)):
            mine.weight.copy_(other.weight)
        plain.o_proj.weight.copy_(torch.eye(DIM))
        q, k = (p(x).unflatten(-1, (4, 16)) for p in (block.q, block.k))
        below = (q * k.cumsum(1)).sum(-1, keepdim=True).abs().div(4).clamp(min=1)
        h = plain(x).unflatten(-1, (4, 16)) / below
        want = block.out_proj(block.ogate_preact(x).sigmoid() * head_norm(h).flatten(-2) * block.multihead_norm.weight)
        torch.testing.assert_close(block(x), want, atol=1e-4, rtol=1e-4)
        block.eps = 0.0
        torch.testing.assert_close(block(x), want, atol=1e-9, rtol=1e-9)


def test_initial_gates():
    block = MatrixLSTM(DIM, num_heads=4)
    assert block.igate_preact.bias.tolist() == [-10.0] * 4 and block.fgate_preact.bias.tolist() == [3.0, 4.0, 5.0, 6.0]
    assert not block.igate_preact.weight.any() and not block.fgate_preact.weight.any()
    assert block.ogate_preact.weight.any()  # the released model's initialisation zeroes every "gate", this one too


def test_defaults_build_at_every_width():
    for dim in (32, 64, 128, 256, 2048, 4096):
        MatrixLSTM(dim, device="meta")
    full = MatrixLSTM(4096, device="meta")  # a layer of xLSTM-7B
    assert (full.num_heads, full.key_dim, full.value_dim) == (8, 256, 512)


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="num_heads=5 must divide"):
        MatrixLSTM(DIM, num_heads=5)
