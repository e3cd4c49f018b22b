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


def check(op, backend, dtype, name, device):
    row = next(r for r in dispatch.rows(op) if r.backend == backend)
    if why := row.objection(torch.device(device), dtype, named=True):
        pytest.skip(why)
    examples = importlib.import_module(f"zoo.kernels.{op}.examples").examples
    args = dict(examples(device, dtype))[name]
    if row.refuse and (why := row.refuse(*differentiable(args))):
        pytest.skip(why)
    reference = next(r for r in dispatch.rows(op) if r.backend == "reference")
    assert first_difference(row.run, reference.run, args) is None


@pytest.mark.parametrize(("op", "backend", "dtype", "name"), list(cases("cpu", (torch.float32,))))
def test_on_the_cpu(op, backend, dtype, name):
    check(op, backend, dtype, name, "cpu")


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
