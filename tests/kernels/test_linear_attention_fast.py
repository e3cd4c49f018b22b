"""The compiled rows of linear attention: the C core in every precision and with threads, the operator that both share,
one token at a time, and the tiles and configurations of the Triton kernels that small examples do not reach."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from zoo.kernels import dispatch, gpu
from zoo.kernels import native as native_core
from zoo.kernels.compare import first_difference
from zoo.kernels.linear_attention import INTERVAL, flops, linear_attention, native, reference
from zoo.kernels.linear_attention.examples import examples

needs_core = pytest.mark.skipif(bool(native_core.missing("linear_attention")), reason="no C compiler")
interpreted = pytest.mark.skipif(not gpu.interpreting(), reason="Triton runs on the GPU here")
NAMES = [name for name, _ in examples("meta", torch.float32)]
KINDS = ("none", "constant", "head", "channel")


def draw(kind, T, B=1, G=1, H=2, Dk=5, Dv=3, dtype=torch.float64, seed=0):
    gen = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=gen, dtype=torch.float64).to(dtype).requires_grad_()

    shape = {"none": None, "constant": (H,), "head": (B, T, H), "channel": (B, T, H, Dk)}[kind]
    g = None if shape is None else torch.nn.functional.logsigmoid(normal(*shape)).detach().requires_grad_()
    return [normal(B, T, G, Dk), normal(B, T, G, Dk), normal(B, T, H, Dv), g, normal(B, H, Dk, Dv)]


def packed(*lengths):
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]


@needs_core
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_core_in_other_precisions(name, dtype):
    args = dict(examples("cpu", dtype))[name]
    args = [x.double() if dtype == torch.float64 and isinstance(x, torch.Tensor) and x.is_floating_point() else x
            for x in args]  # fmt: skip
    assert first_difference(native.linear_attention, reference.linear_attention, args) is None


@needs_core
@pytest.mark.parametrize("docs", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_core_gradients_are_finite_differences(kind, docs):
    T = 19  # over the border of a block of 16
    q, k, v, g, S = draw(kind, T)
    given = [x for x in (q, k, v, g, S) if x is not None]

    def run(q, k, v, *rest):
        g_ = rest[0] if g is not None else None
        ids = packed(1, 15, 2, 1) if docs else None
        return linear_attention(q, k, v, g_, scale=0.7, initial_state=rest[-1], doc_ids=ids, backend="native")

    assert torch.autograd.gradcheck(run, given, fast_mode=True)


@needs_core
@pytest.mark.parametrize("kind", KINDS)
def test_threads_agree(kind):
    args = draw(kind, T=90, B=2, H=6, G=2, Dk=20, Dv=24)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3, 16):  # 16: a group's heads are cut into parts
            torch.set_num_threads(threads)
            o, final = linear_attention(*args[:4], initial_state=args[4], backend="native")
            grads = torch.autograd.grad(o.square().sum() + final.sin().sum(), [x for x in args if x is not None])
            results.append((o, final, *grads))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], atol=1e-11, rtol=1e-11)


@needs_core
@pytest.mark.parametrize("kind", ["head", "channel"])
def test_strong_decay_leaves_what_is_left(kind):
    """At -60 per step only the token itself is seen; the gradient of the decay is 1e-26, not the rounding of what
    cancels."""
    q, k, v, g, _ = draw(kind, T=200, H=2, Dk=16, Dv=16, dtype=torch.float32)
    g = torch.full_like(g, -60.0).requires_grad_()
    o, _ = linear_attention(q, k, v, g, backend="native")
    itself = (q * k).sum(-1, keepdim=True) * v
    torch.testing.assert_close(o, itself, atol=1e-5, rtol=1e-5)
    (dg,) = torch.autograd.grad(o.sum(), g)
    assert dg.abs().max() < 1e-20


@needs_core
@pytest.mark.parametrize("kind", ["head", "channel"])
def test_nothing_flows_between_documents(kind):
    q, k, v, g, _ = draw(kind, T=40)
    ids = packed(7, 1, 24, 8)
    o, _ = linear_attention(q, k, v, g, doc_ids=ids, backend="native")
    (dg,) = torch.autograd.grad(o.square().sum(), g)
    begins = torch.cat([torch.ones(1, 1, dtype=torch.bool), ids[:, 1:] != ids[:, :-1]], 1)
    assert (dg[begins] == 0).all() and (dg[~begins] != 0).any()


@needs_core
def test_states_kept_grow_with_the_length_alone():
    def kept(T):
        tensors = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: tensors.append(t) or t, lambda t: t):
            linear_attention(*draw("head", T, H=2, Dk=16, Dv=16)[:4], backend="native")
        return sum(t.numel() for t in tensors)

    assert kept(8 * INTERVAL) <= 2 * kept(4 * INTERVAL)
    with torch.no_grad():  # and none are kept where there is no backward
        op = torch.ops.zoo.linear_attention
        q, k, v, g, S = draw("head", 70)
        assert op(q, k, v, g, S, None, 1.0, 64, INTERVAL, False, "native")[2].numel() == 0


@needs_core
@pytest.mark.parametrize("kind", ["head", "channel"])
def test_operator_keeps_its_promises(kind):
    q, k, v, g, S = draw(kind, T=21)
    state, ids = (None, packed(9, 12)) if kind == "head" else (S, None)
    args = (q, k, v, g, state, ids, 0.5, 16, INTERVAL, True, "native")
    torch.library.opcheck(torch.ops.zoo.linear_attention.default, args)
    one = [x if x is None or x.ndim == 1 else x[:, :1].contiguous() for x in (q, k, v, g)]
    plain = [x if x is None else x.detach() for x in (*one, S)]
    torch.library.opcheck(torch.ops.zoo.linear_attention_step.default, (*plain, 0.5, "native"))


@needs_core
@pytest.mark.parametrize("T", [1, 37])
@pytest.mark.parametrize("kind", KINDS)
def test_counted_as_the_chunked_form(kind, T):
    q, k, v, g, S = draw(kind, T)
    decay = "head" if kind == "constant" else kind
    want = flops(1, T, 2, 5, 3, num_groups=1, chunk_size=16, decay=decay)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        linear_attention(q, k, v, g, initial_state=S, chunk_size=16, backend="native")
    assert counter.get_total_flops() == want
    with FlopCounterMode(display=False) as counter:
        o, _ = linear_attention(q, k, v, g, initial_state=S, chunk_size=16, backend="native")
        o.sum().backward()
    assert counter.get_total_flops() >= 3 * want


@pytest.mark.parametrize(
    "backend", [pytest.param("native", marks=needs_core), pytest.param("triton", marks=interpreted)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_one_token_after_another(kind, backend):
    q, k, v, g, S = draw(kind, T=5, B=2, G=2, H=4, Dk=24, Dv=40, dtype=torch.float32)
    with torch.no_grad():
        want, last = linear_attention(q, k, v, g, initial_state=S, backend="reference")
        outputs = []
        for t in range(5):
            one = [x if x is None or x.ndim == 1 else x[:, t : t + 1] for x in (q, k, v, g)]
            o, S = linear_attention(*one, initial_state=S, backend=backend)
            outputs.append(o)
        torch.testing.assert_close(torch.cat(outputs, 1), want, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(S, last, atol=1e-4, rtol=1e-4)
        first, _ = linear_attention(
            *(x if x is None or x.ndim == 1 else x[:, :1] for x in (q, k, v, g)), backend=backend
        )
        alone, _ = linear_attention(q, k, v, g, backend="reference")
        torch.testing.assert_close(first, alone[:, :1], atol=1e-4, rtol=1e-4)


@interpreted
@pytest.mark.parametrize("kind", ["head", "channel"])
def test_triton_wider_than_a_tile(kind):
    row = next(r for r in dispatch.rows("linear_attention") if r.backend == "triton")
    q, k, v, g, S = draw(kind, T=66, G=1, H=1, Dk=72, Dv=40, dtype=torch.float32)
    args = (q, k, v, g, 0.3, S, packed(30, 36), 64)
    assert first_difference(row.run, reference.linear_attention, args) is None


@interpreted
def test_every_triton_configuration(monkeypatch):
    row = next(r for r in dispatch.rows("linear_attention") if r.backend == "triton")
    q, k, v, g, _ = draw("channel", T=40, H=1, Dk=16, Dv=16, dtype=torch.float32)
    args = (q, k, v, g, 0.3, None, packed(30, 10), 64)
    gpu.seen.clear()
    check = functools.partial(first_difference, row.run, reference.linear_attention, args)
    assert check() is None
    kernels = {name: configs for name, configs in gpu.seen.items() if name.startswith("linear_attention")}
    assert len(kernels) == 7
    for configs in itertools.zip_longest(*kernels.values()):  # the first of each, the second of each, ..
        for name, config in zip(kernels, configs):
            if config is not None:
                monkeypatch.setitem(gpu.forced, name, config)
        assert check() is None


def test_no_token_leaves_the_state():
    q, k, v, g, S = draw("head", T=0, dtype=torch.bfloat16)
    o, final = linear_attention(q, k, v, g, initial_state=S.float())
    assert o.shape == v.shape and final.dtype == torch.float32 and torch.equal(final, S.float())
    assert not linear_attention(q, k, v, g)[1].any()
