"""The conformance suite: what every block must keep, asked of any block, yours included.

A stranger's block needs no place in this repository. In `my_pkg/my_module.py` write a class with `@register`
(see `zoo.registry`, and `blocks/swiglu.py` for a short example), then

    zoo verify my_pkg.my_module:my_block        # the registered name, or the class's name

or from Python, in a test of your own package:

    from zoo.conformance import verify
    report = verify("my_pkg.my_module:my_block")
    assert report.ok, report

or one pytest case per check, with `cases` and `ask` (as `tests/test_conformance.py` does). If your distribution
declares the entry point `[project.entry-points."zoo.blocks"] my_block = "my_pkg.my_module:MyBlock"`, then
`zoo verify my_block` and `zoo verify all` find it too.

Each check is a function `(subject) -> None` that raises `Failure`. Which checks a block has to answer follows
from its registration alone:

    kind          mixer, ffn and memory follow the law of a block; norm has a shorter list
    causal        asks causality; without it (and without `streaming`) nothing about states is asked
    streaming     asks segment invariance, per-row states, reorder, rollback, decode FLOPs
    state_growth  bounds how the state's bytes may grow with max_len
    ops           asks each backend of these ops against its reference
    relations     are proven, in fp64, with documents and without; limits of parameters too (zoo.relation)
    examples      each is a subject of its own, at dim 64: keep chunk and block sizes small there

A parameter whose gradient is zero for a reason is declared on the class: `without_gradient = {"name": "reason"}`.
Other kinds declare checks of their own with `@check(kinds=("router",))`.
"""

from zoo.conformance.poison import poisoned
from zoo.conformance.report import BLOCK_KINDS, CHECKS, Check, Failure, Report, Result, check
from zoo.conformance.subject import Subject
from zoo.conformance.suite import ask, cases, checks_for, registration_of, run, verify

__all__ = [
    "BLOCK_KINDS", "CHECKS", "Check", "Failure", "Report", "Result", "Subject", "ask", "cases", "check",
    "checks_for", "poisoned", "registration_of", "run", "verify",
]  # fmt: skip
