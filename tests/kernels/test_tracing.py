"""What `kernel: auto` runs on a CPU inside torch.compile, torch.export, activation checkpointing and autocast."""

from __future__ import annotations

import importlib
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from zoo.kernels import dispatch
from zoo.kernels.compare import differentiable, first_difference

OPS = [op for op in dispatch.ops() if find_spec(f"zoo.kernels.{op}.examples")]


def calls(op, dtype=torch.float32, limit=4):
    """Some of an op's examples, spread over the list, and the op as `auto` runs it."""
    examples = list(importlib.import_module(f"zoo.kernels.{op}.examples").examples("cpu", dtype))
    step = -(-len(examples) // limit)
    return [args for _, args in examples[::step]], lambda *args: dispatch.call(op, "auto", *args)


def reference(op):
    return next(row for row in dispatch.rows(op) if row.backend == "reference").run


def floats(values):
    values = values if isinstance(values, (tuple, list)) else (values,)
    return [x for x in values if isinstance(x, Tensor) and x.is_floating_point()]


@pytest.mark.parametrize("op", OPS)
def test_compiles_whole(op):
    examples, run = calls(op)
    for args in examples:
        torch._dynamo.reset()
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        assert first_difference(compiled, reference(op), args) is None


@pytest.mark.parametrize("op", OPS)
def test_exports_to_plain_operations(op):
    class Call(torch.nn.Module):
        def forward(self, *tensors):
            filled = iter(tensors)
            return run(*(next(filled) if isinstance(a, Tensor) else a for a in args))

    examples, run = calls(op, limit=2)
    for args in examples:
        tensors = tuple(a for a in args if isinstance(a, Tensor))
        with torch.no_grad():
            program = torch.export.export(Call(), tensors)
            for got, want in zip(floats(program.module()(*tensors)), floats(run(*args)), strict=True):
                torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4, equal_nan=True)


@pytest.mark.parametrize("op", OPS)
def test_checkpointing_recomputes_the_same(op):
    examples, run = calls(op)
    for args in examples:
        grads = []
        for call in (run, lambda *a: checkpoint(run, *a, use_reentrant=False)):
            given = differentiable(args)
            outputs = [y for y in floats(call(*given)) if y.requires_grad]
            if outputs:
                finite = [torch.where(y.isfinite(), y, 0).sum() for y in outputs]
                grads.append(torch.autograd.grad(sum(finite), floats(given), allow_unused=True))
        for a, b in zip(*grads) if grads else ():
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, atol=0, rtol=0)


@pytest.mark.parametrize("op", OPS)
def test_autocast_changes_no_state_or_gate(op):
    """Under autocast an op gives what it gives for its inputs' own dtype: nothing inside falls to half precision."""
    examples, run = calls(op)
    for args in examples:
        with torch.no_grad():
            plain = floats(run(*args))
            with torch.autocast("cpu", torch.bfloat16):
                cast = floats(run(*args))
        for got, want in zip(cast, plain, strict=True):
            torch.testing.assert_close(got.float(), want.float(), atol=0.05, rtol=0.05)


TWICE = {
    "attention",
    "sparse_attention",
    "delta_rule",
    "linear_attention",
    "selective_scan",
    "rope",
    "diagonal_scan",
    "short_conv",
}


@pytest.mark.parametrize("op", sorted(TWICE & set(OPS)))
def test_gradients_of_gradients(op):
    """create_graph=True through the row that `auto` runs equals the same through the definition."""
    examples, run = calls(op, torch.float64, limit=2)
    for args in examples:
        results = []
        for call in (run, reference(op)):
            given = differentiable(args)
            leaves = floats(given)
            first = sum(torch.where(y.isfinite(), y, 0).square().sum() for y in floats(call(*given)))
            grads = torch.autograd.grad(first, leaves, create_graph=True, allow_unused=True)
            second = sum(g.square().sum() for g in grads if g is not None)
            twice = torch.autograd.grad(second, leaves, allow_unused=True)
            results.append([torch.zeros_like(x) if g is None else g for x, g in zip(leaves, twice)])
        for got, want in zip(*results):
            torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-7)
