"""Fitting rates, and a calibration from the first pass to the file, with a clock of its own."""

import itertools
import json
from dataclasses import replace

import pytest

import zoo
from zoo.errors import ZooError
from zoo.predict import calibrate, calibration
from zoo.predict.fit import rates
from zoo.predict.roofline import predict
from zoo.predict.work import Around, Work

PROBE = calibrate.Probe(32, 64, False, (("prefill", 1, 8, 0), ("train", 2, 16, 0), ("decode", 1, 1, 8)))


def sizes():
    return [(1.0, f, v, (f * v) ** 0.5) for f, v in itertools.product((1e6, 1e8, 3e9), (1e3, 1e5, 1e7))]


def test_rates_are_found_again():
    true = (1e-4, 1e-11, 0.0, 2e-10)
    seconds = [sum(r * x for r, x in zip(true, f, strict=True)) for f in sizes()]
    assert rates(sizes(), seconds) == pytest.approx(true, rel=1e-6, abs=1e-15)


def test_one_disturbed_measurement_changes_little():
    seconds = [1e-4 + 1e-11 * f[1] for f in sizes()]
    seconds[4] *= 3
    found = rates(sizes(), seconds)
    assert found[0] == pytest.approx(1e-4, rel=0.1) and found[1] == pytest.approx(1e-11, rel=0.1)


def test_rates_are_not_below_the_least():
    seconds = [1e-4 + 1e-9 * f[2] for f in sizes()]  # products that cost nothing
    found = rates(sizes(), seconds, (0, 1e-16, 0, 0))
    assert found[1] >= 1e-16 and found[2] == pytest.approx(1e-9, rel=0.05)
    assert rates([(1.0, 0.0), (2.0, 0.0)], [1.0, 2.0], (0, 0.5)) == pytest.approx((1.0, 0.5))  # it is never done


@pytest.fixture(scope="module")
def made():
    """Every look at the clock takes a millisecond."""
    ticks = itertools.count()
    heard = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate, "usable", lambda probe: [{"swiglu": {}}, {"gla": {}}])
        patch.setattr(calibrate, "JOINED", ({"repeat": 2, "of": ["mlp"]},))
        patch.setattr(calibrate, "VARIED", ())
        patch.setitem(calibrate.LADDERS, "cpu", (32, (1, 2)))
        patch.setattr(calibrate, "ROUNDS", 1)
        patch.setattr(calibrate, "_product", lambda device, width: 1e15)
        found = calibrate.calibrate(
            "cpu", [PROBE], (16,), lambda what, left: heard.append(left), lambda: 1e-3 * next(ticks)
        )
    assert heard == [4, 3, 2, 1]
    return found


def test_a_calibration_knows_what_was_measured(made):
    assert {b for b, _ in made.blocks} == {"embedding", "swiglu", "gla", "mlp", "norm", "head"}
    assert {m for _, m in made.blocks} == {"prefill", "train", "decode"} == set(made.rest)
    # two looks at the clock for the norm, two for the block; twice that with backward
    assert made.seconds("swiglu", "prefill", Work(1, *_of("swiglu", "prefill"))) == pytest.approx(2e-3, rel=0.01)
    assert made.seconds("swiglu", "train", Work(1, *_of("swiglu", "train"))) == pytest.approx(4e-3, rel=0.01)
    assert made.error < 0.05 and made.products[16] == 1e15 and made.launch > 0
    assert made.device.flops("float32") == made.products[16]


def _of(block, mode):
    document = {"name": "x", "architecture": "causal_lm", "dim": 32, "vocab_size": 64, "trunk": [block]}
    size = {"prefill": (1, 8), "train": (2, 16)}[mode]
    node = zoo.estimate(document, batch_size=size[0], seq_len=size[1], mode=mode).nodes[1]
    return node.flops, node.vector_flops, node.bytes_read + node.bytes_written


def test_it_is_kept_and_read_again(made, tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "folder", lambda: tmp_path)
    assert calibration.load("cpu") is None
    path = made.save()
    assert path.parent == tmp_path
    again = calibration.load("cpu")
    assert again and json.loads(json.dumps(again.as_dict())) == json.loads(json.dumps(made.as_dict()))
    assert again.environment.changes(made.environment) == []
    other = replace(made.environment, threads=7, torch="1.0")
    assert other.changes(made.environment) == [
        f"threads 7 then, {made.environment.threads} now",
        f"torch 1.0 then, {made.environment.torch} now",
    ]
    # that of another state is better than none
    path.rename(path.with_name("calibration_cpu_another_float32_7.json"))
    assert calibration.load("cpu") is not None


def test_a_spoilt_file_is_said(made, tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "folder", lambda: tmp_path)
    path = made.save()
    for text in ("{", "{}", '{"version": 99}', "[]"):
        path.write_text(text)
        with pytest.raises(ZooError, match=r"no calibration .*`zoo calibrate`"):
            calibration.load("cpu")
    path.write_text('{"version": 1}')
    assert calibration.load("cpu") is None, "of an older Block Zoo"


def test_blocks_that_were_not_calibrated_are_taken_for_their_kind(made):
    report = zoo.estimate("gla_small", batch_size=1, seq_len=64)
    assert made.note("gla") == made.note("merge gated") == ""
    assert "retention was not calibrated" in made.note("retention") and "linear attention" in made.note("retention")
    found = predict(report, made)
    assert found.calibrated and found.total == pytest.approx(sum(found.nodes.values()) + found.rest)
    work = Work(1, 1e6, 1e5, 1e5)
    assert made.seconds("retention", "train", work) == made.seconds("gla", "train", work)
    assert made.seconds("merge gated", "train", work) == 0
    assert made.rest_seconds("train", Around(1, 4, 1e6, 1e5, 1, 1e5)) > 0


def test_every_probe_has_blocks_of_every_kind():
    small = replace(calibrate.PROBES["cpu"][1], shapes=(("train", 1, 32, 0),))
    names = [next(iter(node)) for node in calibrate.usable(small)]
    assert {"attention", "mamba2", "gated_deltanet", "moe", "swiglu", "product_key", "hyena"} <= set(names)
    assert max(names.count(n) for n in names) == calibrate.EXAMPLES
    assert "prefix_lm" not in names  # no causal model has it
