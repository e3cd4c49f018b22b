"""The norms of the residual stream."""

import pytest
import torch

from zoo.blocks.norms import RMSNorm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_zero_centered_holds_what_is_added_to_one(dtype):
    plain, centered = RMSNorm(16, dtype=torch.float64), RMSNorm(16, zero_centered=True, dtype=dtype)
    x = torch.randn(3, 5, 16, dtype=dtype)
    assert torch.equal(centered.weight, torch.zeros(16, dtype=dtype))
    assert torch.equal(centered(x), RMSNorm(16, dtype=dtype)(x))
    with torch.no_grad():
        centered.weight.normal_(std=1e-3)  # in 16 bits most of 1 + w is 1
        plain.weight.copy_(1 + centered.weight.double())
    error = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float64: 1e-14}[dtype]
    torch.testing.assert_close(centered(x).double(), plain(x.double()), atol=error, rtol=0)


def test_zero_centered_is_that_of_gemma():
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

    theirs, ours = Gemma3RMSNorm(16).bfloat16(), RMSNorm(16, zero_centered=True, dtype=torch.bfloat16)
    torch.nn.init.normal_(theirs.weight)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(64, 16).bfloat16()
    assert torch.equal(ours(x), theirs(x))
