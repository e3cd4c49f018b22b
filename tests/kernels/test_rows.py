"""Every row of every op against the op's definition in float64, values and gradients, on the op's examples.

Triton rows run in the interpreter where there is no GPU; on a GPU (`pytest -m gpu`) all rows run on the card, and
each launch configuration is tried, not only the one that is chosen.
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec

import pytest
import torch

from zoo.kernels import dispatch, gpu
from zoo.kernels.compare import differentiable, first_difference

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
OPS = [op for op in dispatch.ops() if find_spec(f"zoo.kernels.{op}.examples")]


def cases(device, dtypes, only=None):
    for op in OPS:
        examples = importlib.import_module(f"zoo.kernels.{op}.examples").examples
        for row in dispatch.rows(op):
            if row.backend == "reference" or only not in (None, row.backend):
                continue
            for dtype in dtypes:
                if dtype in row.dtypes:
                    for name, _ in examples("meta", dtype):
                        yield pytest.param(op, row.backend, dtype, name, id=f"{op}-{row.backend}-{dtype}-{name}"[:120])


def row_and_arguments(op, backend, dtype, name, device, prepared=differentiable):
    row = next(r for r in dispatch.rows(op) if r.backend == backend)
    if why := row.objection(torch.device(device), dtype, named=True):
        pytest.skip(why)
    examples = importlib.import_module(f"zoo.kernels.{op}.examples").examples
    args = dict(examples(device, dtype))[name]
    if row.refuse and (why := row.refuse(*prepared(args))):
        pytest.skip(why)
    return row, args


def check(op, backend, dtype, name, device):
    row, args = row_and_arguments(op, backend, dtype, name, device)
    reference = next(r for r in dispatch.rows(op) if r.backend == "reference")
    assert first_difference(row.run, reference.run, args) is None


@pytest.mark.parametrize(("op", "backend", "dtype", "name"), list(cases("cpu", (torch.float32,))))
def test_on_the_cpu(op, backend, dtype, name):
    check(op, backend, dtype, name, "cpu")


@pytest.mark.parametrize(("op", "backend", "dtype", "name"), list(cases("cpu", (torch.float32,), only="native")))
@pytest.mark.parametrize("threads", [1, 3])
@torch.no_grad()
def test_in_inference(op, backend, dtype, name, threads):
    """Cores have shorter ways for a few tokens without gradients."""
    row, args = row_and_arguments(op, backend, dtype, name, "cpu", prepared=list)
    reference = next(r for r in dispatch.rows(op) if r.backend == "reference")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert first_difference(row.run, reference.run, args, gradients=False) is None
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("op", "backend", "dtype", "name"), list(cases("cpu", (torch.float32,), only="native")))
@pytest.mark.parametrize("gradients", [True, False])
def test_in_any_layout(op, backend, dtype, name, gradients):
    """Cores read memory by pointers: numbers lying the other way round are the same numbers."""

    def reverse(x):
        dims = [*reversed(range(x.dim()))]
        return x.permute(dims).contiguous().permute(dims)

    def turned(args):
        return [reverse(x) if torch.is_tensor(x) else x for x in args]

    def prepared(args):
        return differentiable(turned(args)) if gradients else turned(args)

    row, args = row_and_arguments(op, backend, dtype, name, "cpu", prepared=prepared)
    reference = next(r for r in dispatch.rows(op) if r.backend == "reference")
    with torch.set_grad_enabled(gradients):
        assert first_difference(row.run, reference.run, turned(args), gradients=gradients) is None


@pytest.mark.parametrize(("op", "backend", "dtype", "name"), list(cases("cpu", (torch.float64,))))
def test_gradients_are_finite_differences(op, backend, dtype, name):
    """Along one random direction of all inputs together, in float64."""
    row, args = row_and_arguments(op, backend, dtype, name, "cpu")
    given = differentiable(args)
    generator = torch.Generator().manual_seed(0)

    def value(arguments):
        outputs = row.run(*arguments)
        generator.manual_seed(1)
        total = torch.zeros((), dtype=dtype)
        for y in outputs if isinstance(outputs, tuple) else (outputs,):
            if isinstance(y, torch.Tensor) and y.is_floating_point():
                weight = torch.randn(y.shape, generator=generator, dtype=dtype)
                total = total + torch.where(y.isfinite(), y * weight, 0).sum()
        return total

    leaves = [x for x in given if isinstance(x, torch.Tensor) and x.requires_grad]
    total = value(given)
    if not total.requires_grad:
        return  # nothing in it is differentiable, which the comparison with the definition confirms
    grads = torch.autograd.grad(total, leaves, allow_unused=True)
    with torch.no_grad():
        generator.manual_seed(2)
        ways = [
            torch.zeros_like(x) if g is None else torch.randn(x.shape, generator=generator, dtype=dtype)
            for x, g in zip(leaves, grads)
        ]
        slope = sum((g * w).sum() for g, w in zip(grads, ways) if g is not None)
        ends = []
        for sign in (1, -1):
            moved = iter([x + sign * 1e-6 * w for x, w in zip(leaves, ways)])
            ends.append(value([next(moved) if isinstance(x, torch.Tensor) and x.requires_grad else x for x in given]))
    numeric = (ends[0] - ends[1]) / 2e-6
    torch.testing.assert_close(slope, numeric, rtol=1e-5, atol=1e-5)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize(("op", "backend", "dtype", "name"), list(cases("cuda", (torch.float32, torch.bfloat16))))
def test_on_the_gpu(op, backend, dtype, name):
    check(op, backend, dtype, name, "cuda")


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize(("op", "backend", "dtype", "name"), list(cases("cuda", (torch.bfloat16,), only="triton")))
def test_every_configuration_on_the_gpu(op, backend, dtype, name, monkeypatch):
    gpu.seen.clear()
    check(op, backend, dtype, name, "cuda")
    for kernel, configs in list(gpu.seen.items()):
        for config in configs:
            monkeypatch.setitem(gpu.forced, kernel, config)
            check(op, backend, dtype, name, "cuda")
        monkeypatch.delitem(gpu.forced, kernel)
