"""Segment invariance: the output does not depend on how the sequence is cut, row by row."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zoo.conformance.report import Failure, check
from zoo.conformance.subject import Subject, cuts, finite, gradients, same, stream, tokens
from zoo.registry import Registration
from zoo.segments import differentiable_states

TOLERANCE = 1e-8  # fp64
LENGTH = 75


def streams(registration: Registration) -> bool:
    """Whether the block claims to stream."""
    return registration.streaming and registration.causal


def carries(registration: Registration) -> bool:
    """Whether it streams and has something to carry."""
    return streams(registration) and registration.state_growth != "none"


@check(needs=streams)
@torch.no_grad()
def segments(subject: Subject) -> None:
    """Any cut of a sequence into segments gives the outputs of the whole."""
    block, x = subject.build(), tokens(2, LENGTH)
    whole = block(x)
    for i, parts in enumerate(cuts(LENGTH, 5)):
        for max_len in (LENGTH, None) if i == 0 else ((None, LENGTH, LENGTH + 19)[i % 3],):
            got = stream(block, x, parts, block.init_state(2, max_len))
            short = parts if len(parts) < 12 else [*parts[:6], "..."]
            same(got, whole, TOLERANCE, f"cut {short}, max_len={max_len}, against the whole sequence")


@check(needs=streams)
@torch.no_grad()
def long_segments(subject: Subject) -> None:
    """The same over several chunks of the default size."""
    block, x = subject.build(), tokens(1, 300)
    whole = block(x)
    for parts, max_len in (([200, 1, 99], 300), ([63, 130, 1, 1, 105], None), ([1, 128, 64, 107], 400)):
        got = stream(block, x, parts, block.init_state(1, max_len))
        same(got, whole, TOLERANCE, f"cut {parts}, max_len={max_len}, against the whole sequence")


@check(needs=carries)
@torch.no_grad()
def state_in_place(subject: Subject) -> None:
    """With max_len given, the state keeps its tensors, their memory and their size (CUDA graphs need it)."""
    block, x = subject.build(torch.float32), tokens(2, 21, torch.float32)
    state = block.init_state(2, 21)
    before = [(t.data_ptr(), t.shape, t.dtype) for t in state.tensors()]
    for part in x.split([1, 8, 1, 11], 1):
        block(part, state=state)
        after = [(t.data_ptr(), t.shape, t.dtype) for t in state.tensors()]
        if after != before:
            changed = [i for i, (a, b) in enumerate(zip(after, before)) if a != b]
            raise Failure(f"state tensors {changed} were replaced or changed shape or dtype; write into them instead")


@check(needs=carries)
@torch.no_grad()
def state_overflow(subject: Subject) -> None:
    """More than max_len tokens raise an error or give the right output, never a wrong one."""
    block, x = subject.build(), tokens(1, 24)
    state = block.init_state(1, 16)
    try:
        got = torch.cat([block(part, state=state) for part in x.split([14, 4, 6], 1)], 1)
    except (ValueError, IndexError, RuntimeError):
        return
    same(got, block(x), TOLERANCE, "24 tokens into a state of max_len 16, silently")


def _advance(block, x: Tensor, want: Tensor, state, at: list[int], rows: list[int], n: int, what: str) -> None:
    """Feed the next n tokens of each of `rows` through `rows()` and `put_rows()`."""
    index = torch.tensor(rows)
    part = state.rows(index)
    segment = torch.stack([x[r, at[r] : at[r] + n] for r in rows])
    got = block(segment, state=part)
    state.put_rows(index, part)
    for i, r in enumerate(rows):
        same(got[i], want[r, at[r] : at[r] + n], TOLERANCE, f"{what}: row {r}, tokens {at[r]}:{at[r] + n}")
        at[r] += n


@check(needs=streams)
@torch.no_grad()
def rows_apart(subject: Subject) -> None:
    """Rows at different positions go on independently (rows, put_rows): routers and batching servers."""
    block, x = subject.build(), tokens(4, 40)
    want, rng = block(x), random.Random(3)
    for max_len in (40, None):
        state, at = block.init_state(4, max_len), [0, 0, 0, 0]
        while open_rows := [r for r in range(4) if at[r] < 40]:
            rows = sorted(rng.sample(open_rows, rng.randint(1, len(open_rows))), key=lambda r: rng.random())
            n = min(rng.choice((1, 2, 5, 17)), *(40 - at[r] for r in rows))
            _advance(block, x, want, state, at, rows, n, f"rows {rows} alone, max_len={max_len}")


@check(needs=streams)
@torch.no_grad()
def reorder(subject: Subject) -> None:
    """state.reorder(index) moves rows, repeats them and changes their number (beam search)."""
    block, x = subject.build(), tokens(3, 33)
    want = block(x)
    for max_len in (33, None):
        state, at = block.init_state(3, max_len), [0, 0, 0]
        _advance(block, x, want, state, at, [0, 1, 2], 5, "before reorder")
        _advance(block, x, want, state, at, [2], 3, "before reorder")
        index = [2, 0, 0, 2, 1]
        state.reorder(torch.tensor(index))
        got = block(torch.stack([x[r, at[r] : at[r] + 9] for r in index]), state=state)
        for i, r in enumerate(index):
            same(got[i], want[r, at[r] : at[r] + 9], TOLERANCE, f"after reorder({index}): row {i} was row {r}")


@check(needs=streams)
@torch.no_grad()
def rollback(subject: Subject) -> None:
    """state.snapshot() and restore() undo any number of tokens, more than once (speculative decoding)."""
    block, x = subject.build(), tokens(2, 30)
    want = block(x)
    for max_len in (90, None):
        state = block.init_state(2, max_len)
        same(block(x[:, :11], state=state), want[:, :11], TOLERANCE, "before the snapshot")
        snapshot = state.snapshot()
        for i, rejected in enumerate((40, 1)):
            block(tokens(2, rejected, seed=9), state=state)
            state.restore(snapshot)
            got = stream(block, x[:, 11:24], [1, 12], state)
            same(got, want[:, 11:24], TOLERANCE, f"after rolling {rejected} tokens back (restore {i + 1})")
            state.restore(snapshot)


@check(needs=streams)
@torch.no_grad()
def clone(subject: Subject) -> None:
    """A cloned state shares nothing with its original."""
    block, x = subject.build(), tokens(2, 30)
    want, state = block(x), block.init_state(2, 30)
    block(x[:, :13], state=state)
    copy, before = state.clone(), [t.clone() for t in state.tensors()]
    block(tokens(2, 17, seed=5), state=copy)
    for i, (old, new) in enumerate(zip(before, state.tensors())):
        if not torch.equal(old, new):
            raise Failure(f"running a clone changed tensor {i} of the original state")
    same(block(x[:, 13:], state=state), want[:, 13:], TOLERANCE, "original after its clone ran")


@check(needs=streams)
@torch.no_grad()
def reset_state(subject: Subject) -> None:
    """state.reset(rows) makes those rows new while the others go on; reset() makes all new."""
    block, x, fresh = subject.build(), tokens(3, 30), tokens(3, 30, seed=8)
    want, want_fresh = block(x), block(fresh)
    for max_len in (60, None):
        state = block.init_state(3, max_len)
        block(x[:, :14], state=state)
        state.reset(torch.tensor([1]))
        mixed = torch.stack([x[0, 14:], fresh[1, :16], x[2, 14:]])
        got = block(mixed, state=state)
        same(got[1], want_fresh[1, :16], TOLERANCE, "row 1 after reset([1])")
        same(got[[0, 2]], want[[0, 2], 14:], TOLERANCE, "rows 0 and 2 after reset([1])")
        state.reset()
        same(block(fresh, state=state), want_fresh, TOLERANCE, "after a full reset")


@check(needs=streams)
def segment_gradients(subject: Subject) -> None:
    """Segments can be trained one after the other (truncated BPTT): the first has the gradient it has alone."""
    block, x = subject.build(), tokens(2, 21)
    state = block.init_state(2, 21)
    _, want = gradients(block, x[:, :12])
    _, got = gradients(block, x[:, :12], state=state)
    for name, g in want.items():
        same(got[name], g, TOLERANCE, f"gradient of {name} in a first segment with a state")
    y, second = gradients(block, x[:, 12:], state=state)
    same(y, block(x).detach()[:, 12:], TOLERANCE, "output of a second segment in training")
    for name, g in second.items():
        finite(g, f"gradient of {name} in a second segment")


@check(needs=carries)
def carried_gradients(subject: Subject) -> None:
    """In `differentiable_states` the gradient of a row in segments is that of the whole row, or the block says why
    not (`cuts_gradient`): what `train.sequence_chunks` rests on."""
    block, x = subject.build(), tokens(2, 47)
    if block.cuts_gradient:
        return
    _, want = gradients(block, x)
    for parts in ([18, 1, 28], [5, 42]):
        _, got = gradients(block, x, partial(_linked, block, parts))
        for name, g in want.items():
            same(got[name], g, TOLERANCE, f"gradient of {name}, row cut {parts}, against the whole row")


def _linked(block: Any, parts: list[int], x: Tensor) -> Tensor:
    state, outputs = block.init_state(len(x), x.shape[1]), []
    with differentiable_states():
        for part in x.split(parts, 1):
            state = state.clone()  # a segment writes into what no graph holds
            outputs.append(block(part, state=state))
    return torch.cat(outputs, 1)
