"""Elementwise linear recurrences: rg_lru against Hugging Face and its equation, step by step."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from zoo.blocks.rg_lru import RecurrentBlock

DIM, T = 32, 45
CUTS = [20, 1, 1, 23]


def redraw(module: nn.Module, seed: int = 0) -> nn.Module:
    """Weights of order one, where a fresh layer is nearly silent."""
    gen = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        with torch.no_grad():
            draw = torch.randn(p.shape, generator=gen, dtype=torch.float64)
            p.copy_(draw / p[0].numel() ** 0.5 if p.ndim > 1 else 0.3 * draw)
    return module.double().eval()


def tokens(seed=1, dim=DIM):
    return torch.randn(2, T, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def hugging_face(width=DIM, heads=4):
    from transformers import RecurrentGemmaConfig
    from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRecurrentBlock

    config = RecurrentGemmaConfig(
        hidden_size=DIM, lru_width=width, num_attention_heads=heads, conv1d_width=3, num_hidden_layers=1
    )
    return redraw(RecurrentGemmaRecurrentBlock(config, 0))


# ---------------------------------------------------------------------------------------------- rg_lru
@pytest.mark.parametrize("width", [DIM, 48])
def test_rg_lru_is_that_of_hugging_face(width):
    theirs = hugging_face(width)
    ours = RecurrentBlock(DIM, lru_width=width, num_heads=4, conv_size=3).double()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    results = []
    for call in (ours, lambda x: theirs(x, torch.arange(T)[None], None, use_cache=False)[0]):
        x = tokens().requires_grad_()
        y = call(x)
        layer = ours if call is ours else theirs
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, *dict(layer.named_parameters()).values()))))
    names = ["y", "x", *dict(ours.named_parameters())]
    order = {n: g for n, g in zip(["y", "x", *dict(theirs.named_parameters())], results[1])}
    for name, got in zip(names, results[0]):
        # theirs scans in fp32
        assert (got - order[name]).norm() / order[name].norm() < 3e-6, name


@torch.no_grad()
def test_rg_lru_decodes_as_hugging_face_does():
    theirs = hugging_face()
    ours = RecurrentBlock(DIM, num_heads=4, conv_size=3).double()
    ours.load_state_dict(theirs.state_dict())
    x, state = tokens(), ours.init_state(2)
    start = 0
    for length in (20, *[1] * 25):  # its cache takes one prompt, then single tokens
        part, index = x[:, start : start + length], torch.arange(start, start + length)[None]
        want = theirs(part, index, None, use_cache=True)[0]
        torch.testing.assert_close(ours(part, state=state), want, atol=3e-6, rtol=3e-6)
        start += length
    torch.testing.assert_close(state.conv.mT, theirs.conv1d_state, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(state.h.float(), theirs.rg_lru.recurrent_states.float(), atol=1e-6, rtol=1e-5)


def test_rg_lru_is_its_equation():
    block = redraw(RecurrentBlock(DIM, lru_width=48, num_heads=3))
    x, unit = tokens(), block.rg_lru
    u = F.conv1d(F.pad(block.linear_x(x).mT, (3, 0)), block.conv_1d.weight, block.conv_1d.bias, groups=48).mT
    W_i, W_r = (torch.block_diag(*w.mT) for w in (unit.input_gate_weight, unit.recurrent_gate_weight))
    h, rows = torch.zeros(2, 48, dtype=torch.float64), []
    for t in range(T):
        i = torch.sigmoid(u[:, t] @ W_i.T + unit.input_gate_bias.flatten())
        r = torch.sigmoid(u[:, t] @ W_r.T + unit.recurrent_gate_bias.flatten())
        a = torch.sigmoid(-unit.recurrent_param) ** (8 * r)  # as the paper has it: a^(c r), a = sigmoid(-L)
        h = a * h + (torch.sqrt(1 - a**2) if t else 1) * i * u[:, t]
        rows.append(h)
    want = block.linear_out(torch.stack(rows, 1) * F.gelu(block.linear_y(x), approximate="tanh"))
    torch.testing.assert_close(block(x), want, atol=1e-11, rtol=1e-11)


def test_rg_lru_starts_in_its_ring():
    block = RecurrentBlock(2048)
    a = torch.exp(-F.softplus(block.rg_lru.recurrent_param.double()))
    assert 0.9 - 1e-6 < a.min() < 0.901 and 0.998 < a.max() < 0.999 + 1e-6
    # uniform over the area: a^2 is uniform
    assert abs(a.square().mean() - (0.9**2 + 0.999**2) / 2) < 0.005


@pytest.mark.parametrize("param", [-200.0, -40.0, 40.0])
def test_rg_lru_gradients_stay_finite_at_the_ends(param):
    block = RecurrentBlock(DIM, num_heads=4)
    with torch.no_grad():
        block.rg_lru.recurrent_param.fill_(param)  # a rounds to 1, or to 0
    block(tokens().float()).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in block.parameters())


def test_rg_lru_sizes():
    # RecurrentGemma-2B: gates in blocks of 256
    assert RecurrentBlock(2560, device="meta").num_heads == 10
    with pytest.raises(ValueError, match="num_heads"):
        RecurrentBlock(DIM, num_heads=5)


# ------------------------------------------------------------------------------------------- all of them
LAYERS = {"rg_lru": lambda: RecurrentBlock(DIM, num_heads=4)}


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_a_stream_is_the_whole_in_any_cut(make):
    block, x = redraw(make()), tokens()
    with torch.no_grad():
        for cuts in (CUTS, [1] * T):
            state = block.init_state(2)
            pieces = torch.cat([block(part, state=state) for part in x.split(cuts, 1)], 1)
            torch.testing.assert_close(pieces, block(x), atol=1e-10, rtol=1e-10)


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
