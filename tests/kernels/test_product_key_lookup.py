"""Product-key lookup against scoring every slot."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from zoo.kernels.product_key_lookup import cost, product_key_lookup

N, HEADS, KEYS, WIDTH, VALUE = 7, 3, 6, 8, 5


def problem(dtype=torch.float64):
    g = torch.Generator().manual_seed(1)
    shapes = ((N, HEADS, WIDTH), (HEADS, 2, KEYS, WIDTH // 2), (KEYS**2, VALUE))
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


@pytest.mark.parametrize("top_k", [1, 4, KEYS, 20, KEYS**2])
def test_exact_top_k_and_gradients(top_k):
    inputs = problem()
    got = product_key_lookup(*inputs, top_k, backend="chunked")
    want = product_key_lookup(*inputs, top_k, backend="reference")
    assert torch.equal(got[1], want[1])
    torch.testing.assert_close(got[0], want[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(got[2], want[2], rtol=0, atol=1e-12)
    for g, w in zip(
        torch.autograd.grad(got[0].square().sum(), inputs), torch.autograd.grad(want[0].square().sum(), inputs)
    ):
        torch.testing.assert_close(g, w, rtol=0, atol=1e-11)


def test_all_slots_is_soft_attention_over_the_table():
    query, sub_keys, values = problem()
    out, _, weights = product_key_lookup(query, sub_keys, values, KEYS**2)
    keys = torch.cat([sub_keys[:, 0].repeat_interleave(KEYS, 1), sub_keys[:, 1].repeat(1, KEYS, 1)], -1)  # [H, n^2, k]
    attention = torch.einsum("nhk,hsk->nhs", query, keys).softmax(-1)
    torch.testing.assert_close(out, torch.einsum("nhs,sv->nv", attention, values))
    torch.testing.assert_close(weights.sum(-1), torch.ones(N, HEADS, dtype=torch.float64))


def test_moving_slots_with_their_values_changes_nothing():
    query, sub_keys, values = problem()
    order = torch.randperm(KEYS, generator=torch.Generator().manual_seed(0))
    moved = sub_keys.clone()
    moved[:, 0] = sub_keys[:, 0, order]
    table = values.view(KEYS, KEYS, VALUE)[order].reshape(-1, VALUE)
    torch.testing.assert_close(
        product_key_lookup(query, moved, table, 4)[0], product_key_lookup(query, sub_keys, values, 4)[0]
    )


def test_dtypes_and_flops():
    for dtype in (torch.float32, torch.bfloat16):
        out, _, weights = product_key_lookup(*problem(dtype), 4)
        assert out.dtype == dtype and weights.dtype == torch.float32
        wanted = product_key_lookup(*problem(), 4)[0] if dtype == torch.float32 else out.double()
        torch.testing.assert_close(out.double(), wanted, rtol=1e-4, atol=1e-4)
    with FlopCounterMode(display=False) as counter:
        product_key_lookup(*problem(), 4)
    assert counter.get_total_flops() == cost.flops(N, HEADS, KEYS, WIDTH)


def test_wrong_arguments_are_named():
    query, sub_keys, values = problem()
    with pytest.raises(ValueError, match="top_k must be between 1 and n"):
        product_key_lookup(query, sub_keys, values, 37)
    with pytest.raises(ValueError, match="36 rows, got 30"):
        product_key_lookup(query, sub_keys, values[:30], 4)
    with pytest.raises(ValueError, match="sub_keys must be"):
        product_key_lookup(query, sub_keys[..., :3], values, 4)
