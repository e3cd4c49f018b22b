"""Dense attention: backends against the loop, closed forms, gradients, empty rows, counted FLOPs."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from zoo.errors import KernelUnavailable
from zoo.kernels.attention import attention, attention_flops
from zoo.kernels.attention.mask import QUERY_TILE
from zoo.kernels.merge_lse import merge_lse

torch.manual_seed(0)


def inputs(T, S=None, B=2, Hq=4, Hkv=2, D=8, Dv=8, dtype=torch.float64):
    S = T if S is None else S
    shapes = ((B, T, Hq, D), (B, S, Hkv, D), (B, S, Hkv, Dv))
    return [torch.randn(s, dtype=dtype, requires_grad=True) for s in shapes]


def documents(B, T):
    return torch.sort(torch.randint(0, 3, (B, T)), 1).values


CASES = {
    "causal": {},
    "full": {"causal": False},
    "window": {"window": 5},
    "window and sinks": {"window": 5, "sinks": 3},
    "two-sided window": {"window": 5, "sinks": 2, "causal": False},
    "scale": {"scale": 0.7},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("T, D, Dv", [(1, 8, 8), (2, 8, 6), (63, 8, 8), (QUERY_TILE + 40, 4, 6)])
@pytest.mark.parametrize("packed", [False, True])
def test_backends_equal_the_loop(case, T, D, Dv, packed):
    options = dict(CASES[case])
    q, k, v = inputs(T, D=D, Dv=Dv, B=2)
    if packed:
        options["q_doc_ids"] = documents(2, T)
    want, _ = attention(q, k, v, backend="reference", **options)
    weight = torch.randn_like(want)
    want_grads = torch.autograd.grad((want * weight).sum(), (q, k, v))
    for backend in ("sdpa", "chunked"):
        have, _ = attention(q, k, v, backend=backend, **options)
        torch.testing.assert_close(have, want, rtol=0, atol=1e-10)
        grads = torch.autograd.grad((have * weight).sum(), (q, k, v))
        for a, b in zip(grads, want_grads, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


@pytest.mark.parametrize("softcap, sinky", [(None, True), (3.0, False), (3.0, True)])
def test_softcap_sink_logits_and_lse(softcap, sinky):
    q, k, v = inputs(QUERY_TILE + 9)
    sink = torch.randn(4, dtype=torch.float64, requires_grad=True) if sinky else None
    wrt = [x for x in (q, k, v, sink) if x is not None]
    results = []
    for backend in ("reference", "chunked", "auto"):
        o, lse = attention(q, k, v, softcap=softcap, sink_logits=sink, need_lse=True, backend=backend)
        results.append((o, lse, *torch.autograd.grad(o.sin().sum() + lse.cos().sum(), wrt)))
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
    with pytest.raises(KernelUnavailable, match="sdpa: has no"):
        attention(q, k, v, softcap=softcap, sink_logits=sink, backend="sdpa")
    with pytest.raises(KernelUnavailable, match="log-sum-exp"):
        attention(q, k, v, need_lse=True, backend="sdpa")


@pytest.mark.parametrize("backend", ["reference", "chunked", "sdpa"])
def test_order_indices_shuffled_keys_and_empty_slots(backend):
    q, k, v = inputs(9)
    order = torch.stack([torch.randperm(9) for _ in range(2)])
    shuffled = [torch.stack([x[b, order[b]] for b in range(2)]) for x in (k, v)]
    # empty slots hold finite rubbish: caches are zeroed or hold what was there before
    shuffled = [torch.cat([x, 7 * torch.ones_like(x[:, :2])], 1) for x in shuffled]
    k_index = torch.cat([order, torch.full((2, 2), -1)], 1)
    q_index = torch.arange(9).expand(2, 9)
    for options in ({}, {"window": 3}, {"window": 3, "sinks": 2}, {"causal": False}):
        want, _ = attention(q, k, v, backend="reference", **options)
        have, _ = attention(q, *shuffled, q_index=q_index, k_index=k_index, backend=backend, **options)
        torch.testing.assert_close(have, want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("backend", ["reference", "chunked", "sdpa"])
def test_a_query_that_sees_nothing(backend):
    q, k, v = inputs(3)
    index = torch.arange(3).expand(2, 3)
    empty = torch.full((2, 3), -1)
    lse_wanted = backend != "sdpa"
    o, lse = attention(q, k, v, q_index=index, k_index=empty, need_lse=lse_wanted, backend=backend)
    assert (o == 0).all()
    if lse is not None:
        assert (lse == -torch.inf).all()
    half = torch.tensor([[1, 2, 5], [-1, -1, -1]])
    o, _ = attention(q, k, v, q_index=index, k_index=half, backend=backend)
    assert (o[0, 0] == 0).all() and (o[1] == 0).all() and (o[0, 1:] != 0).all()
    grads = torch.autograd.grad(o.sum(), (q, k, v))
    assert all(g.isfinite().all() for g in grads)
    o, lse = attention(q, k, v, q_index=index, k_index=empty, sink_logits=torch.ones(4).double(), need_lse=True)
    assert (o == 0).all() and (lse == 1).all()


def test_low_precision_and_long_scores():
    q, k, v = inputs(40)
    want, lse = attention(q * 30, k, v, backend="reference", need_lse=True)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 1e-1)):
        o, low = attention((q * 30).to(dtype), k.to(dtype), v.to(dtype), need_lse=True)
        assert o.dtype == dtype and low.dtype == torch.float32
        if dtype == torch.float32:
            torch.testing.assert_close(o.double(), want, rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(low.double(), lse, rtol=tolerance, atol=tolerance)
        o, _ = attention(q.to(dtype), k.to(dtype), v.to(dtype))
        torch.testing.assert_close(o.double(), attention(q, k, v)[0], rtol=tolerance, atol=tolerance)


def test_merge_is_attention_over_the_union():
    q, k, v = inputs(11)
    index = torch.arange(11).expand(2, 11)
    want, want_lse = attention(q, k, v, need_lse=True)
    cuts = [slice(0, 3), slice(3, 4), slice(4, 11)]
    weight = torch.randn_like(want)
    want_grads = torch.autograd.grad((want * weight).sum() + want_lse.sin().sum(), (q, k, v))
    for backend in ("reference", "chunked"):
        parts = [attention(q, k[:, c], v[:, c], q_index=index, k_index=index[:, c], need_lse=True) for c in cuts]
        assert (parts[2][1] == -torch.inf).any()
        o, lse = merge_lse(*zip(*parts, strict=True), backend=backend)
        torch.testing.assert_close(o, want, rtol=0, atol=1e-12)
        torch.testing.assert_close(lse, want_lse, rtol=0, atol=1e-12)
        grads = torch.autograd.grad((o * weight).sum() + lse.sin().sum(), (q, k, v))
        for a, b in zip(grads, want_grads, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_merge_of_nothing(backend):
    o = torch.full((2, 1, 1, 1, 2), torch.nan)
    lse = torch.full((2, 1, 1, 1), -torch.inf)
    if backend == "chunked":  # kernels differ in what they leave in an empty row
        merged, total = merge_lse(o, lse, backend=backend)
        assert (merged == 0).all() and (total == -torch.inf).all()
    merged, total = merge_lse(torch.zeros_like(o), lse, backend=backend)
    assert (merged == 0).all() and (total == -torch.inf).all()
    with pytest.raises(ValueError, match="as many lses"):
        merge_lse([o], [])


@pytest.mark.parametrize("T", [1, 70, 2 * QUERY_TILE + 3])
def test_counted_flops(T):
    settings = itertools.product(CASES, [(8, 8), (8, 6), (6, 8)], ["sdpa", "chunked"])
    for case, (D, Dv), backend in settings:
        options = {key: value for key, value in CASES[case].items() if key != "scale"}
        q, k, v = inputs(T, D=D, Dv=Dv, dtype=torch.float32)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            attention(q, k, v, backend=backend, **options)
        want = attention_flops(2, T, T, 4, D, Dv, fused=backend == "sdpa", **options)
        assert counter.get_total_flops() == want, (case, D, Dv, backend)
    index = torch.arange(T).expand(2, T)
    with FlopCounterMode(display=False) as counter:
        attention(q[:, -1:], k, v, q_index=index[:, -1:], k_index=index, window=5)
    assert counter.get_total_flops() == attention_flops(2, 1, T, 4, D, Dv, window=5, plain=False)
    # a window's cost is linear in the length
    assert attention_flops(1, 10**5, 10**5, 1, 8, window=64) < 10**5 * 2 * 64 * 2 * 16 * 1.1


def test_formulas_for_ops_that_torch_counts_as_zero():
    q, k, v = inputs(7, Hq=4, Hkv=4, dtype=torch.float32)
    with FlopCounterMode(display=False) as counter:
        attention(q, k, v)[0].sum().backward()
    assert counter.get_total_flops() == 2 * 2 * 4 * 7 * 7 * 7 * 8  # 2 products forward, 5 backward
    a, b = torch.randn(6, 4), torch.randn(3, 4, 8)
    offsets = torch.tensor([1, 3, 6], dtype=torch.int32)
    triangle = torch.randn(2, 6, 6).tril()
    with FlopCounterMode(display=False) as counter:
        torch._grouped_mm(a, b, offs=offsets)
    assert counter.get_total_flops() == 2 * 6 * 4 * 8
    with FlopCounterMode(display=False) as counter:
        torch.linalg.solve_triangular(triangle, torch.randn(2, 6, 3), upper=False)
    assert counter.get_total_flops() == 2 * 36 * 3


def test_refusals():
    q, k, v = inputs(3, 5)
    with pytest.raises(ValueError, match="needs q_index"):
        attention(q, k, v)
    with pytest.raises(ValueError, match="go together"):
        attention(q, k, v, q_index=torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="multiple"):
        attention(q[:, :, :3], k, v, causal=False)


def test_compiles_whole():
    q, k, v = inputs(20, dtype=torch.float32)
    for options in ({}, {"window": 4, "sinks": 1}, {"softcap": 2.0, "need_lse": True}):
        compiled = torch.compile(lambda q, k, v, o=options: attention(q, k, v, **o)[0], fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(q, k, v), attention(q, k, v, **options)[0])
