"""The compiled rows of the selective scan: the C core in every precision and with threads, the operator that both
share, one token at a time, and the tiles and configurations of the Triton kernels that small examples do not reach."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from zoo.kernels import dispatch, gpu
from zoo.kernels import native as native_core
from zoo.kernels.compare import first_difference
from zoo.kernels.selective_scan import INTERVAL, flops, native, reference, selective_scan
from zoo.kernels.selective_scan.examples import examples

needs_core = pytest.mark.skipif(bool(native_core.missing("selective_scan")), reason="no C compiler")
interpreted = pytest.mark.skipif(not gpu.interpreting(), reason="Triton runs on the GPU here")
COMPILED = [pytest.param("native", marks=needs_core), pytest.param("triton", marks=interpreted)]
NAMES = [name for name, _ in examples("meta", torch.float32)]


def draw(T, B=1, E=5, N=3, dtype=torch.float64, strength=1.0, seed=0):
    """u, delta, A, B, C and a state."""
    gen = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    tensors = [
        normal(B, T, E), F.softplus(normal(B, T, E)), -strength * (0.1 + normal(E, N).abs()), normal(B, T, N),
        normal(B, T, N), normal(B, E, N),
    ]  # fmt: skip
    return [x.to(dtype).requires_grad_() for x in tensors]


def packed(*lengths):
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]


def triton_row():
    return next(row for row in dispatch.rows("selective_scan") if row.backend == "triton")


@needs_core
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_core_in_other_precisions(name, dtype):
    args = dict(examples("cpu", dtype))[name]
    args = [x.double() if dtype == torch.float64 and isinstance(x, torch.Tensor) and x.is_floating_point() else x
            for x in args]  # fmt: skip
    assert first_difference(native.selective_scan, reference.selective_scan, args) is None


@needs_core
@pytest.mark.parametrize("lengths", [None, (1, 62, 1, 1, 9), (64, 10)])
def test_core_gradients_are_finite_differences(lengths):
    T = 74  # over the border of an interval
    ids = None if lengths is None else packed(*lengths)

    def run(u, delta, A, B, C, h):
        return selective_scan(u, delta, A, B, C, initial_state=h, doc_ids=ids, backend="native")

    assert torch.autograd.gradcheck(run, draw(T), fast_mode=True)


@needs_core
@pytest.mark.parametrize(("E", "N"), [(1, 1), (7, 16), (8, 3), (17, 5), (40, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_core_at_any_size(E, N, dtype):
    """Whole and broken vectors of channels; numbers of states that are no power of two."""
    args = [*draw(67, B=2, E=E, N=N, dtype=dtype), packed(30, 1, 36).expand(2, -1), 16]
    assert first_difference(native.selective_scan, reference.selective_scan, args) is None


@needs_core
def test_threads_agree():
    args = draw(T=90, B=2, E=70, N=4)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3, 16):  # 16: the channels of a row are cut into parts
            torch.set_num_threads(threads)
            y, last = selective_scan(*args[:5], initial_state=args[5], backend="native")
            results.append((y, last, *torch.autograd.grad(y.square().sum() + last.sin().sum(), args)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], atol=1e-11, rtol=1e-11)


@needs_core
def test_the_same_bits_every_time():
    args = draw(T=100, B=2, E=33, N=6, dtype=torch.float32)
    first, second = (torch.autograd.grad(selective_scan(*args[:5], backend="native")[0].sum(), args[:5]) for _ in "ab")
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("backend", COMPILED)
def test_a_document_forgets_what_was_before_it(backend):
    u, delta, A, B, C, h = draw(T=40, dtype=torch.float32)
    y, last = selective_scan(u, delta, A, B, C, initial_state=h, doc_ids=packed(17, 23), backend=backend)
    grads = torch.autograd.grad(y[:, 17:].square().sum() + last.sum(), (u, delta, B, h))
    assert all((g[:, :17] == 0).all() for g in grads[:3]) and (grads[3] == 0).all()
    alone, end = selective_scan(u[:, 17:], delta[:, 17:], A, B[:, 17:], C[:, 17:], backend=backend)
    torch.testing.assert_close(y[:, 17:], alone)
    torch.testing.assert_close(last, end)


@pytest.mark.parametrize("backend", COMPILED)
def test_strong_decay_is_exact(backend):
    """exp(-60) and exp(-6000) of a step: nothing overflows on the way back either."""
    for strength in (60.0, 6000.0):
        args = [*draw(20, E=16, N=4, dtype=torch.float32, strength=strength), None, 16]
        row = next(row for row in dispatch.rows("selective_scan") if row.backend == backend)
        assert first_difference(row.run, reference.selective_scan, args) is None


@pytest.mark.parametrize("backend", COMPILED)
def test_one_token_after_another(backend):
    u, delta, A, B, C, h = draw(5, B=2, E=20, N=6, dtype=torch.float32)
    with torch.no_grad():
        want, end = selective_scan(u, delta, A, B, C, initial_state=h, backend="reference")
        outputs = []
        for t in range(5):
            one = (x[:, t : t + 1] for x in (u, delta))
            y, h = selective_scan(*one, A, B[:, t : t + 1], C[:, t : t + 1], initial_state=h, backend=backend)
            outputs.append(y)
        torch.testing.assert_close(torch.cat(outputs, 1), want, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(h, end, atol=1e-4, rtol=1e-4)
        first, _ = selective_scan(u[:, :1], delta[:, :1], A, B[:, :1], C[:, :1], backend=backend)
        alone, _ = selective_scan(u, delta, A, B, C, backend="reference")
        torch.testing.assert_close(first, alone[:, :1], atol=1e-4, rtol=1e-4)


@needs_core
def test_states_kept_grow_with_the_length_alone():
    def kept(T):
        tensors = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: tensors.append(t) or t, lambda t: t):
            selective_scan(*draw(T, E=16, N=8)[:5], backend="native")
        return sum(t.numel() for t in tensors)

    assert kept(8 * INTERVAL) <= 2 * kept(4 * INTERVAL)
    with torch.no_grad():  # and none are kept where there is no backward
        op = torch.ops.zoo.selective_scan_fused
        assert op(*draw(70), None, INTERVAL, False, "native")[2].numel() == 0


@needs_core
@pytest.mark.parametrize("alone", [False, True])
def test_operator_keeps_its_promises(alone):
    *tensors, h = draw(T=21)
    args = (*tensors, None if alone else h, packed(9, 12) if alone else None, 16, True, "native")
    torch.library.opcheck(torch.ops.zoo.selective_scan_fused.default, args)


@needs_core
@pytest.mark.parametrize("T", [1, 37])
def test_counted_as_the_chunked_form(T):
    args = draw(T, B=2, E=8, N=4)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        selective_scan(*args[:5], backend="native")
    assert counter.get_total_flops() == flops(2, T, 8, 4)
    with FlopCounterMode(display=False) as counter:
        selective_scan(*args[:5], backend="native")[0].sum().backward()
    assert counter.get_total_flops() >= 3 * flops(2, T, 8, 4)


@interpreted
@pytest.mark.parametrize(("E", "N"), [(40, 3), (16, 24)])
def test_triton_wider_than_a_tile(E, N):
    args = [*draw(19, E=E, N=N, dtype=torch.float32), packed(8, 11), 16]
    assert first_difference(triton_row().run, reference.selective_scan, args) is None


@interpreted
def test_every_triton_configuration(monkeypatch):
    args = [*draw(35, E=20, N=4, dtype=torch.float32), packed(30, 5), 16]
    gpu.seen.clear()
    assert first_difference(triton_row().run, reference.selective_scan, args) is None
    kernels = {name: configs for name, configs in gpu.seen.items() if name.startswith("selective_scan")}
    assert kernels
    for configs in itertools.zip_longest(*kernels.values()):  # the first of each, the second of each, ..
        for name, config in zip(kernels, configs):
            if config is not None:
                monkeypatch.setitem(gpu.forced, name, config)
        assert first_difference(triton_row().run, reference.selective_scan, args) is None


def test_no_token_leaves_the_state():
    u, delta, A, B, C, h = draw(0)
    y, last = selective_scan(u.bfloat16(), delta, A, B, C, initial_state=h.float())
    assert y.shape == u.shape and last.dtype == torch.float32 and torch.equal(last, h.float())
    assert not selective_scan(u, delta, A, B, C)[1].any()
