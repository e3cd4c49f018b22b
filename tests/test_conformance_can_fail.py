"""Each check can fail: blocks broken in one way each, and the check that must notice."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re

import pytest
import torch
import toy_block
from broken_blocks import BROKEN
from torch import nn

from zoo.conformance import verify
from zoo.conformance.graphs import graph_relations
from zoo.conformance.relations import parse, prove
from zoo.conformance.report import CHECKS, Failure
from zoo.conformance.subject import Subject
from zoo.conformance.suite import registration_of
from zoo.errors import ConfigError
from zoo.kernels import dispatch
from zoo.registry import register
from zoo.relation import Place, Relation


@pytest.mark.parametrize("name", BROKEN)
def test_broken_block_is_noticed(name):
    cls, checks, crash = BROKEN[name]
    for check in checks:
        failures = verify(f"broken_blocks:{name}", only=[check]).failures
        assert failures, f"{check} did not notice {cls.__name__}"
        for failure in failures:  # noticed for the right reason, not by a crash of the test's own code
            assert crash in failure.message
            assert crash or not re.match(r"\w*Error: ", failure.message), failure.message


@contextlib.contextmanager
def broken_backend(fn):
    """The best row of short_conv, wrong on purpose."""
    before = list(dispatch.rows("short_conv"))
    dispatch.register_row("short_conv", "broken", fn, priority=99)
    try:
        yield
    finally:
        dispatch._rows["short_conv"][:] = before


def _right(*args):
    from zoo.kernels.short_conv import chunked

    return chunked.short_conv(*args)


def _off_by_little(*args):
    y, state = _right(*args)
    return y * (1 + 1e-6), state


def _no_weight_gradient(x, weight, *rest):
    return _right(x, weight.detach(), *rest)


def _wrong_state(*args):
    y, state = _right(*args)
    return y, state * 0.9


def _coarse_float32(*args):
    y, state = _right(*args)
    return (y if y.dtype == torch.float64 else y.bfloat16().float()), state


def _wrong_when_long(*args):
    y, state = _right(*args)
    return (y * 2 if y.shape[1] > 100 else y), state


@pytest.mark.parametrize(
    ("fn", "check"),
    [
        (_off_by_little, "fast_paths"),
        (_no_weight_gradient, "fast_paths"),
        (_wrong_state, "fast_streaming"),
        (_coarse_float32, "fast_path_float32"),
        (_wrong_when_long, "fast_paths_long"),
    ],
)
def test_broken_backend_is_noticed(fn, check):
    assert verify("toy_block:toy", only=[check]).ok
    with broken_backend(fn):
        assert not verify("toy_block:toy", only=[check]).ok


def test_right_toy_passes_everything():
    report = verify("toy_block:toy")
    assert report.ok, report


def test_every_check_was_seen_to_fail():
    seen = {c for _, checks, _ in BROKEN.values() for c in checks}
    seen |= {"fast_paths", "fast_paths_long", "fast_streaming", "fast_path_float32"}
    seen |= {"any_leading_shape", "graph_relations"}  # below
    assert {c.name for c in CHECKS if c.fn.__module__.startswith("zoo.conformance.")} == seen


def test_norm_that_looks_at_its_neighbours_is_noticed():
    from zoo.blocks.norms import RMSNorm

    @register("batchy", kind="norm")
    class Batchy(RMSNorm):
        def forward(self, x):
            return super().forward(x) + x.mean()

    toy_block.Batchy = Batchy
    assert not verify("toy_block:batchy", only=["any_leading_shape"]).ok


def test_declared_parameter_may_be_without_gradient():
    cls = BROKEN["deadparameter"][0]
    cls.without_gradient = {"dead": "kept for old checkpoints"}
    try:
        assert verify("broken_blocks:deadparameter", only=["gradient_reaches"]).ok
    finally:
        del cls.without_gradient


@pytest.mark.parametrize(
    "text",
    [
        "gla", "gla() == ", "gla(1) == mlp()", "a() != b()", "a() == b() == c()", "a(x=f()) == b()", "a() == b() at ",
        "a() == b() at x", "a() == b() at x=1 2", "a() == b() at x[a]=1", "a() == b() at x..y=1",
    ],
)  # fmt: skip
def test_relation_that_cannot_be_read(text):
    with pytest.raises(Failure, match="relation"):
        parse(text)


@pytest.mark.parametrize(
    ("relation", "words"),
    [
        ("loop(steps=2) == loop(steps=3)", "differs by"),
        ("loop(steps=1) == repeat(times=3)", "other parameters"),
        # in training alone, where the top half of a row is taken
        ("route(router={'mod': {'capacity': 0.5, 'activation': 'one'}}) == sequence()", "differs by"),
    ],
)
def test_false_relation_of_a_combinator_is_noticed(relation, words):
    registration = dataclasses.replace(registration_of("loop"), relations=(relation,))
    with pytest.raises(Failure, match=words):
        graph_relations(Subject("loop", registration, {}))


def test_relation_is_parsed():
    assert parse("gla(gate='none') == linear_attention()") == Relation(
        ("gla", {"gate": "none"}), ("linear_attention", {})
    )
    limit = parse("a() == b() at x.bias=-inf, y[:2, 1]=eye, norm=identity, w.0[3:]=q.weight[:, ::2]")
    assert limit.settings == (
        (Place("x.bias"), -math.inf),
        (Place("y", (slice(None, 2), 1)), Place("eye")),
        (Place("norm"), Place("identity")),
        (Place("w.0", (slice(3, None),)), Place("q.weight", (slice(None), slice(None, None, 2)))),
    )
    assert limit.skipped == (Place("norm"),)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("gate=0", ""),
        ("conv=0, gate=7", ""),
        ("v_proj.weight[:, :]=0", ""),
        ("conv[:, 0]=0", "differs by"),
        ("gate=0, scale=1", "neither side has a parameter named scale"),
        ("gate=0, norm=identity", "neither side has a module named norm"),
        ("gate=bias", "0 parameters named bias"),
        ("gate=conv", "has shape"),
        ("gate=conv[:, 0]", "differs by"),
    ],
)
def test_limits_of_parameters_are_proven_and_missed(settings, words):
    subject = Subject("toy_block:toy", registration_of("toy_block:toy"), {})
    relation = f"toy(gate=True) == toy() at {settings}"
    with pytest.raises(Failure, match=words) if words else contextlib.nullcontext():
        prove(subject, relation)


def test_unknown_check_and_unknown_block():
    with pytest.raises(ConfigError, match="did you mean causal"):
        verify("swiglu", only=["causla"])
    with pytest.raises(ConfigError, match="did you mean swiglu"):
        verify("swiglo")
    with pytest.raises(ConfigError, match="cannot import"):
        verify("no_such_package.module:block")


def test_kind_without_checks_says_so():
    @register("nothing", kind="head")
    class Nothing(nn.Module):
        pass

    toy_block.Nothing = Nothing
    report = verify("toy_block:nothing")
    assert not report.results and "nothing was verified" in str(report)
