"""Timing, comparing and judging: the arithmetic of `zoo bench`, on toys."""

from __future__ import annotations

import math

import pytest
import torch

from zoo.bench import groups, peers, scaling, tune
from zoo.bench.groups import Candidate, Contest, Group, Settings
from zoo.bench.machine import Peaks, memory_peak, slug
from zoo.bench.timing import Runner, Timing, race, rotated, rounds_for
from zoo.kernels import gpu

PEAKS = Peaks(flops=1e9, copy=1e9, stream=5e8)
FAST = Settings(rounds=1)


def test_a_timing():
    timing = Timing((4.0, 1.0, 2.0, 3.0, 100.0))
    assert (timing.median, timing.least) == (3.0, 1.0)
    assert timing.spread == pytest.approx((52.0 - 1.5) / 3.0)  # quartiles
    assert Timing((1.0, 3.0)).spread == pytest.approx(1.0)
    assert Timing((2.0,)).spread == 0.0


def test_rounds_are_interleaved_and_begin_with_another_one():
    assert [rotated("abc", turn) for turn in range(4)] == [list("abc"), list("bca"), list("cab"), list("abc")]
    order = []
    runners = {n: Runner(lambda n=n: order.append(n), lambda n=n: order.append(f"{n}!")) for n in "ab"}
    timings = race(runners, "cpu", 3)
    # the first sample counts where nothing is repeated; two more rounds, each run prepared, then nobody is left
    assert order == ["a!", "a", "b!", "b", "a!", "a", "b!", "b", "b!", "b", "a!", "a"]
    assert all(len(t.samples) == 3 for t in timings.values())


def test_short_calls_are_repeated_and_long_ones_take_part_less():
    calls = []
    timing = race({"a": Runner(lambda: calls.append(1))}, "cpu", 2)["a"]
    assert len(calls) > 100 and len(timing.samples) == 2 and timing.least < 1.0
    assert [rounds_for(ms, 7) for ms in (1, 2_500, 10_000, 30_000)] == [7, 6, 3, 1]
    assert rounds_for(10_000, 2) == 2


def candidate(name, by="peer", value=1.0, **options):
    return Candidate(name, by, Runner(lambda: torch.full((3,), value)), **options)


def held(monkeypatch, candidates, times, settings=FAST, **options):
    monkeypatch.setattr(groups.gc, "collect", lambda: 0)
    monkeypatch.setattr(groups, "race", lambda runners, *a: {n: Timing((times[n],)) for n in runners})
    group = Group("toy", "forward", 8, lambda seq: Contest(candidates, flops=10**6, moved=500_000), **options)
    return groups.hold(group, settings, PEAKS)


def test_ratios_compare_with_the_quickest_peer(monkeypatch):
    rows = [candidate("native", "zoo", row=True), candidate("chunked", "zoo", row=True), candidate("x"), candidate("y")]
    times = {"native": 2.0, "chunked": 5.0, "x": 10.0, "y": 8.0}
    found = held(monkeypatch, rows, times, wanted=3.0)
    assert (found["peer"], found["reached"], found["wanted"]) == ("y", 4.0, 3.0)
    by = {row["name"]: row for row in found["rows"]}
    assert [by[n]["ratio"] for n in by] == [4.0, 1.6, 0.8, 1.0]
    assert [by[n]["chosen"] for n in by] == [True, False, False, False]
    # 1 ms for the FLOPs, 0.5 ms for the bytes
    assert found["bound_ms"] == 1.0 and by["native"]["roofline"] == 0.5 and by["native"]["gflops"] == 0.5
    named = held(monkeypatch, rows, times, Settings(rounds=1, peer="x"))
    assert (named["peer"], named["reached"]) == ("x", 5.0)
    assert held(monkeypatch, rows, times, Settings(rounds=1, peer="none"))["peer"] is None
    alone = held(monkeypatch, rows[:2], times)
    assert (alone["peer"], alone["reached"]) == ("chunked", 2.5)


def test_a_step_is_bound_by_reading():
    assert PEAKS.bound_ms(1000, 500_000, step=True) == 1.0
    assert PEAKS.bound_ms(1000, 500_000) == 0.5


def test_what_computes_something_else_is_not_timed(monkeypatch):
    def broken():
        raise RuntimeError("\nno device\nmore")

    rows = [
        candidate("zoo", "zoo"),
        candidate("other", value=1.5),
        candidate("dense", value=9.0, alike=False),
        Candidate("raises", "peer", Runner(broken)),
        Candidate.refused("absent", "peer", "is not installed"),
    ]
    found = held(monkeypatch, rows, {"zoo": 1.0, "dense": 2.0})
    problems = {row["name"]: row["problem"] for row in found["rows"]}
    assert problems == {
        "zoo": None,
        "other": "not timed: its result is off by 5.0e-01 of the values",
        "dense": None,
        "raises": "RuntimeError: no device",
        "absent": "is not installed",
    }
    assert [row["name"] for row in found["rows"] if "median_ms" in row] == ["zoo", "dense"]
    assert list(groups.wrong([found])) == ["toy forward: other " + problems["other"]]


def test_difference():
    x = torch.tensor([1.0, math.inf, -math.inf])
    assert groups.difference([x], [x]) == 0.0
    assert groups.difference([x[:1]], [x]) == math.inf
    assert groups.difference([], [x]) == math.inf
    assert groups.difference([torch.tensor([math.nan])], [torch.ones(1)]) == math.inf
    assert groups.difference([torch.tensor([3, 4])], [torch.tensor([3, 3])]) == pytest.approx(1 / math.sqrt(18))


def test_what_grows_too_fast_is_left_out():
    assert groups.foretold(0.01, 0.02, 1.0) is None  # too short to tell
    assert groups.foretold(0.1, 0.2, 2.0) is None  # linear: 1.6 s
    assert "T^2.0, about 26 s" in groups.foretold(0.1, 0.4, 25.0)
    assert groups.foretold(0.1, 0.4, 26.0) is None


def test_what_needs_too_much_memory_is_left_out():
    GiB = 2.0**30
    assert (
        groups.foretold_memory(0.25 * GiB, 1.0 * GiB, 100 * GiB)
        == "left out: would need about 64 GiB, 100 GiB are free"
    )
    assert groups.foretold_memory(0.25 * GiB, 1.0 * GiB, 200 * GiB) is None
    assert groups.foretold_memory(0.5 * GiB, 1.0 * GiB, 21 * GiB) is None  # linear: 8 GiB
    assert groups.foretold_memory(1e3, 1e6, 1e6) is None  # too little to tell


def test_growth_for_twice_the_length():
    assert scaling.for_doubling(4, 10.0, 8, 20.0) == pytest.approx(2.0)
    assert scaling.for_doubling(4, 1.0, 16, 16.0) == pytest.approx(4.0)
    assert scaling.for_doubling(4, 0.0, 8, 1.0) is None
    rows = scaling.rows({"8": Timing((1.0,)), "16": Timing((3.0,))})
    assert [row["growth"] for row in rows] == [None, pytest.approx(3.0)]


def test_memory_peak():
    def peak(n):
        with memory_peak("cpu") as found:
            x = torch.zeros(n, 1 << 20)
            x = x + 1
        return found["bytes"]

    if peak(1) is None:
        pytest.skip("this system does not tell")
    assert peak(8) == pytest.approx(2 * 8 * 4 * (1 << 20), rel=0.1)


def test_somebodys_cache_is_put_back():
    class Layer:
        def __init__(self):
            self.keys, self.count, self.sizes = torch.zeros(2), 1, {0: torch.zeros(1)}

    class Cache:
        def __init__(self):
            self.layers, self.kind = [Layer()], Layer

    cache = Cache()
    saved, address = peers.snapshot(cache), cache.layers[0].sizes[0].data_ptr()
    layer = cache.layers[0]
    layer.keys, layer.count = torch.ones(3), 2
    layer.sizes[0].fill_(5)
    for _ in range(2):
        peers.restore(cache, saved)
        assert torch.equal(layer.keys, torch.zeros(2)) and layer.count == 1 and layer.sizes[0].item() == 0
        assert layer.sizes[0].data_ptr() == address and cache.layers[0] is layer and cache.kind is Layer
        layer.keys = torch.cat([layer.keys, torch.ones(1)])


def test_tuning_keeps_the_quickest_correct_configuration(monkeypatch):
    used = []
    monkeypatch.setattr(tune, "race", lambda runners, *a: {n: Timing((float(n),)) for n in runners})

    def run():
        used.append(gpu.forced["k"]["BLOCK"])
        if used[-1] == 256:
            raise RuntimeError("out of resource")

    configs = [{"BLOCK": b} for b in (32, 256, 64, 128)]
    monkeypatch.setattr(gpu, "forced", {})
    found = tune.choose("k", configs, lambda c: "is wrong" if c["BLOCK"] == 32 else None, run, FAST)
    assert found["kept"] == {"BLOCK": 64} and used == [256, 64, 128]
    assert [t["problem"] for t in found["tried"]] == ["is wrong", "RuntimeError: out of resource", None, None]
    assert tune.choose("k", configs[:1], lambda c: "is wrong", run, FAST)["kept"] is None


def test_options_are_recorded_for_tuning(monkeypatch):
    monkeypatch.setattr(gpu, "seen", {})
    monkeypatch.setattr(gpu, "asked", {})
    assert gpu.options("k", torch.zeros(1), [{"BLOCK": 1}, {"BLOCK": 2}], T=8, D=4) == {"BLOCK": 1}
    assert gpu.asked == {"k": {"k D=4 T=8"}} and len(gpu.seen["k"]) == 2
    assert gpu.tuned_path("NVIDIA H100 80GB HBM3").name == "nvidia_h100_80gb_hbm3.json"
    assert slug("AMD EPYC 9B14 ") == "amd_epyc_9b14"
