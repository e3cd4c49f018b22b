"""Every backend of a block's ops against their definitions in `reference.py`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch

from zoo.conformance.law import carries
from zoo.conformance.report import Failure, check
from zoo.conformance.subject import Subject, gradients, same, tokens
from zoo.errors import KernelUnavailable
from zoo.kernels.dispatch import rows, use
from zoo.registry import Registration

TOLERANCE = 1e-8  # fp64


def has_ops(registration: Registration) -> bool:
    """Whether the block runs on dispatched ops."""
    return bool(registration.ops)


def reference(subject: Subject) -> AbstractContextManager[None]:
    """Context in which every op of the block runs by its definition."""
    ops = subject.registration.ops
    for op in ops:
        if "reference" not in [r.backend for r in rows(op)]:
            raise Failure(f"op {op!r} has no reference backend")
    return use(**dict.fromkeys(ops, "reference"))


def choices(subject: Subject, dtype: torch.dtype) -> Iterator[dict[str, str]]:
    """The dispatcher's own choice, then each other backend that this machine can run."""
    yield {}
    for op in subject.registration.ops:
        legal = [r.backend for r in rows(op) if not r.objection(torch.device("cpu"), dtype)]
        for backend in legal[1:]:  # the first is what the dispatcher takes
            if backend != "reference":
                yield {op: backend}


def _compare(subject: Subject, length: int) -> None:
    block, x = subject.build(), tokens(2, length, seed=length)
    with reference(subject):
        want, want_grads = gradients(block, x)
    for choice in choices(subject, x.dtype):
        what = f"{choice or 'fast path'} against reference, T={length}"
        try:
            with use(**choice):
                got, grads = gradients(block, x)
        except KernelUnavailable:
            if not choice:
                raise
            continue  # that row refuses this call, and says why
        same(got, want, TOLERANCE, what)
        for name, g in want_grads.items():
            same(grads[name], g, TOLERANCE, f"{what}: gradient of {name}")


@check(needs=has_ops)
def fast_paths(subject: Subject) -> None:
    """Each backend equals the reference, forward and backward, at lengths around the chunk."""
    for length in subject.lengths():
        _compare(subject, length)


@check(needs=has_ops, slow=True)
def fast_paths_long(subject: Subject) -> None:
    """Each backend equals the reference, forward and backward, at T = 257."""
    _compare(subject, 257)


@check(needs=has_ops)
def fast_path_float32(subject: Subject) -> None:
    """The fast path in fp32 is near the fp64 reference, forward and backward."""
    narrow, wide = subject.build(torch.float32), subject.build()
    with torch.no_grad():
        for p, q in zip(wide.parameters(), narrow.parameters(), strict=True):
            p.copy_(q)
    x = tokens(2, 63, torch.float32, seed=63)
    with reference(subject):
        want, want_grads = gradients(wide, x.double())
    got, grads = gradients(narrow, x)
    same(got, want, 1e-4, "fp32 fast path against the fp64 reference")
    for name, g in want_grads.items():
        same(grads[name], g, 1e-3, f"fp32 fast path against the fp64 reference: gradient of {name}")


@check(needs=lambda r: has_ops(r) and carries(r))
@torch.no_grad()
def fast_streaming(subject: Subject) -> None:
    """The reference continues a state that the fast path began, and the other way round."""
    block, x = subject.build(), tokens(2, 41)
    want = block(x)
    for turn in (0, 1):
        state, outputs = block.init_state(2, 41), []
        for i, part in enumerate(x.split([20, 1, 20], 1)):
            with reference(subject) if i % 2 == turn else nullcontext():
                outputs.append(block(part, state=state))
        what = "fast path and reference taking turns on one state"
        same(torch.cat(outputs, 1), want, TOLERANCE, what)
