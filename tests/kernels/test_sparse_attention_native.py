"""The C core of sparse attention: both orders of work, threads, the operator, and that nothing grows with T^2."""

from __future__ import annotations

import functools

import pytest
import torch

from zoo.kernels import native as native_core
from zoo.kernels.block_list import BlockList, sort_ids
from zoo.kernels.compare import first_difference
from zoo.kernels.sparse_attention import fused, native, reference, sparse_attention
from zoo.kernels.sparse_attention.examples import examples

pytestmark = pytest.mark.skipif(bool(native_core.missing("sparse_attention")), reason="no C compiler")
NAMES = [name for name, _ in examples("meta", torch.float32)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("by_keys", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_both_orders_of_work(name, by_keys, dtype, monkeypatch):
    monkeypatch.setattr(native, "keys_first", lambda *sizes: by_keys)
    args = dict(examples("cpu", dtype))[name]
    assert first_difference(native.attend, reference.sparse_attention, args) is None


def shared(T=700, heads=4, kv_heads=2, blocks=3, kv_block=32, **kinds):
    """More rows than the 2048 of a part, more keys than a panel, tiles larger than a chunk of rows."""
    g = torch.Generator().manual_seed(T)
    q, k, v = (torch.randn(1, T, h, 20, generator=g, **kinds).requires_grad_() for h in (heads, kv_heads, kv_heads))
    order = torch.rand(1, kv_heads, -(-T // 70), -(-T // kv_block), generator=g).argsort(-1)[..., :blocks]
    return q, k, v, BlockList(sort_ids(order), 70, kv_block)


@pytest.mark.parametrize("by_keys", [True, False])
def test_large_tiles_over_several_parts(by_keys, monkeypatch):
    monkeypatch.setattr(native, "keys_first", lambda *sizes: by_keys)
    q, k, v, blocks = shared(T=1300, dtype=torch.float64)
    run = functools.partial(sparse_attention, blocks=blocks, causal=False)
    got, want = (run(q, k, v, backend=backend) for backend in ("native", "chunked"))
    torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)
    weight = torch.linspace(-1, 1, got[0].numel(), dtype=q.dtype).view_as(got[0])
    grads = [torch.autograd.grad((o * weight).sum() + lse.sum(), (q, k, v)) for o, lse in (got, want)]
    torch.testing.assert_close(*grads, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("by_keys", [True, False])
def test_threads_change_no_bit(by_keys, monkeypatch):
    monkeypatch.setattr(native, "keys_first", lambda *sizes: by_keys)
    q, k, v, blocks = shared()
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            o, lse = sparse_attention(q, k, v, blocks, backend="native")
            results.append((o, lse, *torch.autograd.grad(o.square().sum(), (q, k, v))))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_operator_is_what_it_says():
    for name in ("documents", "bias per key head, not causal"):
        q, k, v, blocks, causal, window, scale, *masks = dict(examples("cpu", torch.float32))[name]
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        options = (blocks.q_tile, blocks.kv_block, blocks.stride, causal, window, scale, "native")
        checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
        torch.library.opcheck(fused._forward, (q, k, v, blocks.idx, *masks, *options), test_utils=checks)


def test_inductor_compiles_it_whole():
    q, k, v, blocks = shared(T=90)

    def run(q, k, v, idx):
        return sparse_attention(q * 2, k, v, BlockList(idx, 70, 32))[0].square().sum()

    want = torch.autograd.grad(run(q, k, v, blocks.idx), (q, k, v))
    whole = torch.compile(run, fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(whole(q, k, v, blocks.idx), (q, k, v)), want)


def test_inputs_of_different_precision():
    q, k, v, blocks = shared(T=90)
    o, lse = sparse_attention(q.bfloat16(), k, v.bfloat16(), blocks, backend="native")
    assert o.dtype == torch.bfloat16 and lse.dtype == torch.float32
    grads = torch.autograd.grad(o.float().sum(), (q, k, v))
    want = torch.autograd.grad(sparse_attention(q, k, v, blocks, backend="chunked")[0].sum(), (q, k, v))
    for a, b in zip(grads, want):
        torch.testing.assert_close(a, b, atol=3e-2 * b.abs().max().item(), rtol=0)


def test_finite_differences():
    q, k, v, blocks = shared(T=80, heads=2, blocks=2, dtype=torch.float64)
    q, k, v = (x.detach()[:, :9, :, :3].requires_grad_() for x in (q, k, v))
    blocks = BlockList(torch.tensor([[0, 2], [1, -1], [-1, -1]], dtype=torch.int32).expand(1, 2, 3, 2), 3, 4)

    def run(*tensors):
        o, lse = sparse_attention(*tensors, blocks, backend="native")
        return o, torch.where(lse.isinf(), 0, lse)

    assert torch.autograd.gradcheck(run, (q, k, v))
    assert torch.autograd.gradgradcheck(run, (q, k, v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_huge_logits_and_shut_out_keys(dtype):
    q, k, v, blocks = shared(T=90, dtype=dtype)
    bias = torch.where(torch.arange(90) % 3 == 0, float("-inf"), 0)[None, :, None]
    run = functools.partial(sparse_attention, q * 1e4, k, v, blocks, k_bias=bias, causal=False)
    (o, lse), want = run(backend="native"), run(backend="reference")
    near = 1e-2 if dtype == torch.float32 else 1e-10  # logits of 1e4 in fp32 are known to 1e-3
    torch.testing.assert_close((o, lse), want, atol=near, rtol=near)
    assert all(g.isfinite().all() for g in torch.autograd.grad(o.sum(), (q, k, v)))


def test_function_transforms_are_left_to_others():
    args = dict(examples("cpu", torch.float32))["documents"]
    seen = []
    torch.func.vmap(lambda x: seen.append(native.refuse(x[None], *args[1:])) or x)(args[0])
    assert "torch.func" in seen[0] and native.refuse(*args) is None
