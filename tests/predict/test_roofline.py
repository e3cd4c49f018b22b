"""Predicted times of devices that nobody measured: what follows from the table by hand."""

import pytest

import zoo
from zoo.devices import DEVICES, Device
from zoo.predict.kinds import KINDS, is_joint, kind_of
from zoo.predict.roofline import BANDWIDTH, SHARES, VECTOR_BYTES, Assumed, predict
from zoo.predict.work import Work, around, work_of

PLAIN = Device("plain", 1e10, 1e12, {"float32": 1e13, "bfloat16": 1e14}, 1e13, 1e10, 1e9, launch=1e-6)
TIMING = Assumed(PLAIN, "bfloat16")
LLAMA = {
    "name": "x", "architecture": "causal_lm", "dim": 64, "vocab_size": 100,
    "trunk": [{"repeat": 2, "of": [{"attention": {"num_heads": 2}}, "swiglu"]}],
}  # fmt: skip


def test_kinds():
    kinds = {
        "attention": "attention", "gla": "linear attention", "gated_deltanet": "delta rule", "mamba": "scan",
        "moe": "grouped products", "swiglu": "linear", "hyena": "convolution", "moba": "sparse attention",
        "product_key": "lookup", "norm": "elementwise", "head (tied)": "linear", "merge gated": "elementwise",
        "expert_choice": "elementwise",
    }  # fmt: skip
    assert {block: kind_of(block) for block in kinds} == kinds
    assert all(kind_of(name) in KINDS and kind_of(name) in SHARES for name in zoo.list_blocks())
    assert [is_joint(b) for b in ("merge gated", "expert_choice", "norm", "embedding", "swiglu", "head")] == [
        True, True, False, False, False, False,
    ]  # fmt: skip


def test_a_roofline_by_hand():
    share = SHARES["linear"]
    launches = 1e-6 * share.launches
    bound = Work(1, 1e12, 0, 1e6)
    assert TIMING.seconds("swiglu", "prefill", bound) == pytest.approx(1e12 / (share.products * 1e14) + launches)
    moving = Work(1, 1e6, 0, 1e10)
    assert TIMING.seconds("swiglu", "prefill", moving) == pytest.approx(1e10 / (BANDWIDTH * 1e12) + launches)
    other = Work(0, 0, 1e9, 0)
    assert TIMING.seconds("swiglu", "prefill", other) == pytest.approx(VECTOR_BYTES * 1e9 / (BANDWIDTH * 1e12))
    assert TIMING.seconds("swiglu", "train", Work(2)) == pytest.approx(6 * launches)
    assert Assumed(PLAIN, "float32").seconds("swiglu", "prefill", bound) > 9 * TIMING.seconds(
        "swiglu", "prefill", bound
    )


def test_nodes_add_up_and_devices_differ():
    report = zoo.estimate("llama_1b", batch_size=4, seq_len=2048)
    found = {name: predict(report, Assumed(DEVICES[name], "bfloat16")) for name in ("h100", "h200", "a100", "l40s")}
    for one in found.values():
        assert set(one.nodes) == {n.path for n in report.nodes} and not one.calibrated
        assert one.total == pytest.approx(sum(one.nodes.values()) + one.rest)
    assert found["h200"].total < found["h100"].total < found["a100"].total < found["l40s"].total
    peak = report.flops / 989.5e12 * 1e3
    assert 0.25 < peak / found["h100"].total < 0.65


def test_a_decoded_token_waits_for_its_weights():
    report = zoo.estimate("llama_1b", batch_size=1, seq_len=1, context_len=128, mode="decode")
    found = predict(report, Assumed(DEVICES["h100"], "bfloat16"))
    streams = 1e3 * 4 * report.params / (BANDWIDTH * DEVICES["h100"].bandwidth)
    assert streams < found.total < 2.5 * streams  # and for launches


def test_only_the_last_tokens_logits_are_wanted():
    for length in (16, 64):
        report = zoo.estimate(LLAMA, batch_size=2, seq_len=length, mode="prefill")
        head = work_of(report.nodes[-1], report)
        assert head.matrix == 2 * 2 * 64 * 100
        assert head.traffic == 4 * (64 * 100 + 2 * 64 + 2 * 100)
    report = zoo.estimate(LLAMA, batch_size=2, seq_len=16)
    assert work_of(report.nodes[-1], report).matrix == 3 * 2 * 2 * 16 * 64 * 100


def test_what_lies_around_nodes():
    report = zoo.estimate(LLAMA, batch_size=2, seq_len=16)
    found, stream = around(report), 4 * 2 * 16 * 64
    assert (found.calls, found.joints) == (7, 0) and found.logits == 4 * 2 * 16 * 100
    assert found.streams == 7 * stream
    loop = {**LLAMA, "trunk": [{"loop": 3, "of": ["swiglu"]}]}
    report = zoo.estimate(loop, batch_size=2, seq_len=16)
    assert around(report).calls == 6 and around(report).joints == 1


def test_loops_call_and_long_segments_are_cut():
    streamed = {**LLAMA, "trunk": [{"window_global": {"num_heads": 2, "window": 8, "num_globals": 4, "chunk_size": 8}}]}
    train = zoo.estimate(streamed, batch_size=1, seq_len=32).nodes[1]
    later = zoo.estimate(streamed, batch_size=1, seq_len=32, context_len=8, mode="decode").nodes[1]
    assert (train.calls, train.pieces, later.calls, later.pieces) == (1, 1, 1, 4)
    loop = zoo.estimate({**LLAMA, "trunk": [{"loop": 3, "of": ["swiglu"]}]}, batch_size=1, seq_len=32)
    assert [(n.calls, n.pieces) for n in loop.nodes if n.block == "swiglu"] == [(3, 3)]
