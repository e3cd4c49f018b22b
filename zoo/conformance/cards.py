"""What a block says of itself: card, options, parallel plan."""

from __future__ import annotations

from fnmatch import fnmatch

import torch
import yaml

from zoo.conformance.fastpaths import has_ops
from zoo.conformance.report import BLOCK_KINDS, Failure, check
from zoo.conformance.subject import DIM, Subject
from zoo.contract import Block
from zoo.registry import load, options

WITH_NORMS = (*BLOCK_KINDS, "norm")
TENSOR = ("column", "row", "expert", "replicate", "once")


@check(kinds=WITH_NORMS, per_block=True)
def card(subject: Subject) -> None:
    """The docstring opens with one line, and a law that does not hold has its reason in `note`."""
    cls, registration = load(subject.name), subject.registration
    summary = (cls.__doc__ or "").strip().split("\n", 1)[0]
    if not summary or len(summary) > 120:
        raise Failure(f"the first line of the docstring must be a summary of at most 120 characters, got {summary!r}")
    if registration.kind != "norm" and not issubclass(cls, Block):
        raise Failure("the class is no subclass of zoo.contract.Block")
    if not (registration.causal and registration.streaming) and not registration.note:
        raise Failure("causal=False or streaming=False needs its reason: @register(..., note='...')")


@check(kinds=WITH_NORMS, per_block=True)
def options_are_typed(subject: Subject) -> None:
    """Every option is keyword-only and annotated, so that configurations can be checked."""
    options(subject.name)


@check(kinds=WITH_NORMS)
def yaml_round_trip(subject: Subject) -> None:
    """Options written to YAML and read back build the same block."""
    again = Subject(subject.name, subject.registration, yaml.safe_load(yaml.safe_dump(dict(subject.options))))
    first, second = subject.create().state_dict(), again.create().state_dict()
    if first.keys() != second.keys() or any(not torch.equal(first[k], second[k]) for k in first):
        raise Failure("the block built from the options that YAML gave back differs")


@check(needs=has_ops, per_block=True)
def kernel_option(subject: Subject) -> None:
    """A block with a `kernel` option takes its op's backends and refuses others with a ValueError."""
    if "kernel" not in options(subject.name):
        return
    try:
        load(subject.name)(DIM, **{**subject.options, "kernel": "no-such-backend"})
    except ValueError:
        return
    raise Failure("kernel='no-such-backend' was accepted; call check_backend(op, kernel)")


@check()
def plan(subject: Subject) -> None:
    """The parallel plan names every parameter or says why there is none."""
    block = subject.create(device="meta")
    said = block.parallel_plan()
    if (not said.tensor or said.context == "none") and not said.reason:
        raise Failure("a parallel plan without tensor sharding or without context parallelism needs a reason")
    if wrong := {k: v for k, v in said.tensor.items() if v not in TENSOR}:
        raise Failure(f"{wrong}: a tensor plan is one of {', '.join(TENSOR)}")
    if said.units < 1:
        raise Failure(f"units must be at least 1, got {said.units}")

    def covers(pattern: str, name: str) -> bool:
        return name == pattern or name.startswith(pattern + ".") or fnmatch(name, pattern)

    # a pattern may match nothing (options switch modules off); a misspelt one leaves its parameter out
    names = [n for n, _ in block.named_parameters()]
    if said.tensor and (missed := [n for n in names if not any(covers(p, n) for p in said.tensor)]):
        raise Failure(f"the plan leaves {missed} out; say 'replicate' where that is meant")
