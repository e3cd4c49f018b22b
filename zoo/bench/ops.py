"""`zoo bench OP`: every legal row of an op and its peers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from zoo.bench import peers
from zoo.bench.cases import CASES, Case
from zoo.bench.groups import Candidate, Contest, Group, Settings, What
from zoo.bench.problems import Draw, Problem
from zoo.bench.timing import Runner
from zoo.kernels import dispatch

# rows that call other people's kernels
LIBRARY_ROWS = ("sdpa", "flex", "flash_attn", "xformers", "fla", "mamba_ssm", "torch")
LOOPS = ("zoo.bench.peers.transformers:rglru_scan",)
CONTEXT = 2048  # tokens before a decode step


def groups(cases: Sequence[Case], settings: Settings, lengths: Sequence[int] = ()) -> Iterator[Group]:
    """Forward, forward and backward, and a step of each case, at each length."""
    for case in cases:
        for seq in lengths or (case.seq * (2 if settings.device == "cuda" else 1),):
            yield group(case, "forward", seq, settings)
            if case.backward:
                yield group(case, "forward+backward", seq, settings)
        if case.step:
            yield group(case, "step", max(lengths or (CONTEXT,)), settings)


def group(
    case: Case,
    what: What,
    seq: int,
    settings: Settings,
    rows: Sequence[str] | None = None,
    wanted: float | None = None,
    title: str = "",
) -> Group:
    """One question about a case. rows: backends to race, all by default; `auto` is what a block runs."""

    def build(length: int) -> Contest:
        return contest(case, what, length, settings, rows)

    return Group(title or case.title, what, seq, build, context=seq if what == "step" else 0, wanted=wanted)


def contest(case: Case, what: What, seq: int, settings: Settings, rows: Sequence[str] | None = None) -> Contest:
    """The candidates at one length."""
    problem = case.make(Draw(settings.device, settings.dtype), seq, what == "step")
    candidates = [*_rows(case, problem, what, settings, rows), *_peers(case, problem, what, settings)]
    return Contest(candidates, *work(problem, what))


def work(problem: Problem, what: What) -> tuple[int, int]:
    """FLOPs and bytes: a backward does twice the products of its forward, reads inputs, outputs and the gradients of
    these, and writes the gradients of those."""
    with torch.no_grad():
        outputs = problem.call("auto", *problem.inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    read, written = (sum(x.numel() * x.element_size() for x in xs) for xs in (problem.inputs, outputs))
    if what == "forward+backward":
        return 3 * problem.flops, 3 * read + 2 * written
    return problem.flops, read + written


def _rows(
    case: Case, problem: Problem, what: What, settings: Settings, rows: Sequence[str] | None
) -> Iterator[Candidate]:
    if rows == ("auto",):
        call = _by(problem, "auto")
        yield Candidate("zoo", "zoo", runner(call, problem.inputs, what), row=True)
        return
    for row in dispatch.rows(case.op):
        if rows and row.backend not in rows:
            continue
        by: Literal["zoo", "peer"] = "peer" if row.backend in LIBRARY_ROWS else "zoo"
        why = row.objection(torch.device(settings.device), settings.dtype)
        if why:
            yield Candidate.refused(row.backend, by, why)
            continue
        call = _by(problem, row.backend)
        growing = row.backend in ("reference", "chunked") and what != "step"
        yield Candidate(row.backend, by, runner(call, problem.inputs, what), row=True, growing=growing)


def _by(problem: Problem, backend: str) -> Callable[..., Any]:
    return lambda *inputs: problem.call(backend, *inputs)


def _peers(case: Case, problem: Problem, what: What, settings: Settings) -> Iterator[Candidate]:
    for name, path in case.step_peers if what == "step" else case.peers:
        make = peers.find(path, settings.device)
        if isinstance(make, str):
            yield Candidate.refused(name, "peer", make)
            continue
        with torch.no_grad():
            call, inputs = make(*(x.clone() for x in problem.inputs))
        growing = what == "forward+backward"
        yield Candidate(name, "peer", runner(call, inputs, what), growing=growing)
        if settings.compiled:
            if path in LOOPS:
                why = "a Python loop over tokens, which torch.compile would unroll"
                yield Candidate.refused(f"{name}, compiled", "peer", why)
                continue
            torch._dynamo.reset()  # or the limit on recompilations sends it back to eager
            yield Candidate(f"{name}, compiled", "peer", runner(torch.compile(call), inputs, what))


def runner(call: Callable[..., Any], inputs: Sequence[Tensor], what: What) -> Runner:
    """What is timed: a call without gradients, or a call and the gradients of a random functional of its first
    output with respect to every float input. Agreement is asked of the output and the first gradient."""
    own = [x.detach().clone() for x in inputs]
    if what != "forward+backward":

        def forward() -> Any:
            with torch.no_grad():
                return call(*own)

        return Runner(forward)
    leaves = [x.requires_grad_() for x in own if x.is_floating_point()]
    weight: list[Tensor] = []

    def both() -> list[Tensor]:
        outputs = call(*own)
        y = outputs[0] if isinstance(outputs, tuple) else outputs
        if not weight:
            generator = torch.Generator().manual_seed(1)
            weight.append(torch.randn(y.shape, generator=generator).to(y.device, y.dtype))
        grads = torch.autograd.grad(y, leaves, weight[0], allow_unused=True)
        first = torch.zeros_like(leaves[0]) if grads[0] is None else grads[0]
        return [y.detach(), first]

    return Runner(both)


def titles() -> list[str]:
    """Ops that have cases."""
    return sorted({case.op for case in CASES})
