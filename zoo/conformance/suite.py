"""Choosing, running and reporting the checks."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from zoo.conformance import (  # noqa: F401  (fill CHECKS)
    cards,
    causality,
    costs,
    fastpaths,
    graphs,
    law,
    modules,
    relations,
    tracing,
)
from zoo.conformance.poison import poisoned
from zoo.conformance.report import CHECKS, Check, Failure, Report, Result
from zoo.conformance.subject import Subject
from zoo.errors import ConfigError, did_you_mean
from zoo.registry import COMPONENTS, Registration, block_card, load

_HERE, _TORCH = str(Path(__file__).parent), str(Path(torch.__file__).parent)


def _under_test(name: str) -> tuple[str, Registration]:
    """What is built, and what it says of itself. A component is asked as the block that takes it, with the laws,
    relations and examples of its own."""
    found = load(name).zoo_registration if ":" in name else block_card(name)  # type: ignore[attr-defined]
    if found.kind not in COMPONENTS:
        return name, found
    heads = {"num_heads": 4, "num_kv_heads": 2}
    examples = tuple({**heads, found.kind: {name: dict(options)}} for options in found.examples or ({},))
    return "attention", replace(found, kind="mixer", ops=("rope", *found.ops), examples=examples)


def registration_of(name: str) -> Registration:
    """What `@register` says of a block of the zoo, or of a stranger's `package.module:name`."""
    return _under_test(name)[1]


def checks_for(registration: Registration) -> list[Check]:
    """The checks that apply to a block with this registration, by its kind and capabilities."""
    return [c for c in CHECKS if c.applies(registration)]


def cases(name: str, only: Iterable[str] | None = None, slow: bool = True) -> Iterator[tuple[Check, Subject]]:
    """Every (check, subject) pair of a block."""
    wanted = None if only is None else set(only)
    for unknown in sorted((wanted or set()) - {c.name for c in CHECKS}):
        raise ConfigError(f"unknown check {unknown!r}{did_you_mean(unknown, [c.name for c in CHECKS])}")
    built, registration = _under_test(name)
    for c in checks_for(registration):
        if (wanted is not None and c.name not in wanted) or (c.slow and not slow):
            continue
        examples = registration.examples or ({},)
        for options in examples[:1] if c.per_block else examples:
            yield c, Subject(built, registration, options)


def _crash(error: Exception) -> str:
    """Type, first paragraph and place of an exception; a compiler's message can have hundreds of lines."""
    text = str(error).strip().split("\n\n")[0][:600] or "no message"
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [f for f in frames if not f.filename.startswith((_HERE, _TORCH))]
    place = f" ({theirs[-1].filename}:{theirs[-1].lineno} in {theirs[-1].name})" if theirs else ""
    return f"{type(error).__name__}: {text}{place}"


def ask(c: Check, subject: Subject) -> Result:
    """Run one check. Any exception is a failure: a crash is no answer."""
    start = time.perf_counter()
    message = ""
    try:
        with poisoned():
            c.fn(subject)
    except Failure as failure:
        message = str(failure)
    except Exception as error:
        message = _crash(error)
    return Result(subject.name, c.name, dict(subject.options), not message, time.perf_counter() - start, message)


def run(
    name: str,
    *,
    only: Iterable[str] | None = None,
    slow: bool = True,
    progress: Callable[[Result], None] = lambda result: None,
) -> list[Result]:
    """Ask a block all that applies to it, or the checks named in `only`; `progress` sees each result."""
    results = []
    for c, subject in cases(name, only, slow):
        results.append(ask(c, subject))
        progress(results[-1])
    return results


def verify(
    name: str,
    *,
    only: Iterable[str] | None = None,
    slow: bool = True,
    progress: Callable[[Result], None] = lambda result: None,
) -> Report:
    """The whole report of one block; what `zoo verify NAME` prints."""
    results = run(name, only=only, slow=slow, progress=progress)
    note = "" if results else f"no check applies to kind {registration_of(name).kind!r}; nothing was verified"
    return Report(name, results, note)
