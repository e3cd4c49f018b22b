"""gated_conv against Hugging Face's layer, outputs and gradients, and its reach."""

from __future__ import annotations

import pytest
import torch

from zoo.blocks.gated_conv import GatedConv

DIM, T = 16, 21


@pytest.mark.parametrize("taps, bias", [(3, False), (4, True)])
def test_it_is_that_of_hugging_face(taps, bias):
    from transformers import Lfm2Config
    from transformers.models.lfm2.modeling_lfm2 import Lfm2ShortConv

    config = Lfm2Config(hidden_size=DIM, conv_L_cache=taps, conv_bias=bias, num_hidden_layers=1, layer_types=["conv"])
    theirs = Lfm2ShortConv(config, 0).double()
    ours = GatedConv(DIM, conv_size=taps, bias=bias).double()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, T, DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    results, names = [], [n for n, _ in ours.named_parameters()]
    for layer in (ours, theirs):
        layer.zero_grad()
        given = x.clone().requires_grad_()
        layer(given).square().sum().backward()
        results.append([layer(x), given.grad, *(layer.get_parameter(n).grad for n in names)])
    for mine, wanted in zip(*results, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-12 * (1 + wanted.abs().max().item()))


def test_a_token_sees_its_window_alone():
    block = GatedConv(DIM, conv_size=4).double()
    x = torch.randn(1, T, DIM, dtype=torch.float64)
    changed = x.clone()
    changed[:, 5] += 1
    moved = (block(changed) - block(x)).abs().amax((0, 2)) > 0
    assert moved.nonzero().flatten().tolist() == [5, 6, 7, 8]
