"""The largest batch and the longest context that fit, and what a run costs."""

from dataclasses import replace

import pytest

import zoo
from zoo.architectures.storage import assemble
from zoo.devices import DEVICES, USABLE
from zoo.errors import ConfigError
from zoo.graph.loader import load_graph
from zoo.plan.bill import amount, bill, laid_out
from zoo.plan.limits import MOST, largest, limits, needed
from zoo.plan.subject import Subject
from zoo.predict.roofline import Assumed
from zoo.sections import TrainSection

H100, L4 = DEVICES["h100"], DEVICES["l4"]


def test_the_largest_of_anything():
    for slope, fixed, start in ((1, 0, 1), (7, 1000, 3), (1000, 0, 100), (13, 5, 10**6)):
        asked = []

        def need(n, slope=slope, fixed=fixed, asked=asked):
            asked.append(n)
            return fixed + slope * n

        found, exact = largest(need, 10**6, start), (10**6 - fixed) // slope
        assert 0.97 * exact - 1 <= found <= exact and len(asked) < 15
    assert 990 <= largest(lambda n: n * n, 10**6, 1) <= 1000
    assert 10**4 * 0.97 <= largest(lambda n: 10 if n <= 10**4 else 10**9, 10**6, 1) <= 10**4
    assert largest(lambda n: 10**7, 10**6, 64) == 0
    assert largest(lambda n: 5, 10**6, 64) is None and MOST > 10**7


@pytest.mark.parametrize("mode", ["train", "prefill", "decode"])
def test_limits_agree_with_themselves(mode):
    model = assemble(load_graph("llama_1b"))
    before = 512 if mode == "decode" else 0
    tokens = 1 if mode == "decode" else 512

    def at(rows, more=0):
        context = before + more if mode == "decode" else 0
        length = tokens if mode == "decode" else tokens + more
        report = zoo.estimate(model, batch_size=rows, seq_len=length, context_len=context, mode=mode)
        return limits(model, report, L4, TrainSection())

    found = at(1)
    assert found.memory == int(USABLE * L4.memory) and found.batch and found.context
    assert found.fits == (found.batch > 0)
    full = at(found.batch)
    assert full.fits and full.need > 0.9 * full.memory and not at(2 * found.batch + 1).fits
    longest = at(1, found.context - before - tokens)
    assert longest.fits and longest.need > 0.9 * longest.memory


def test_a_context_beyond_the_memory():
    model = assemble(load_graph("llama_1b"))
    report = zoo.estimate(model, batch_size=1, seq_len=1, context_len=10**7, mode="decode")
    found = limits(model, report, L4, TrainSection())
    assert not found.fits and found.batch == 0 and 10**4 < found.context < 10**7
    assert not found.as_dict()["fits"]
    # a state of one size fits whatever has been read
    linear = assemble(load_graph("mamba2_130m"))
    report = zoo.estimate(linear, batch_size=1, seq_len=1, context_len=512, mode="decode")
    assert limits(linear, report, L4, TrainSection()).context is None


def test_a_bill_by_hand():
    graph = load_graph("llama_1b")
    train = TrainSection(batch_size=64, dtype="bfloat16")
    subject = Subject(assemble(graph), train, 1024)
    timing = Assumed(H100, "bfloat16")
    made = laid_out(subject, {"dp_shard": 8}, 8, H100, timing)
    found = bill(made, subject, 64 * 1024 * 1000, 2.5)
    assert found.steps == 1000 and found.hours == pytest.approx(1000 * made.seconds / 3600)
    assert found.gpu_hours == pytest.approx(8 * found.hours) and found.money == pytest.approx(2.5 * found.gpu_hours)
    assert found.kilowatt_hours == pytest.approx(0.7 * found.gpu_hours)
    assert found.tokens_per_second == pytest.approx(64 * 1024 / made.seconds)
    assert bill(made, subject, 1e9, None).money is None
    # two nodes wait for weights: the same work costs more
    more = laid_out(subject, {"dp_shard": 16}, 16, H100, timing)
    assert bill(more, subject, 1e9, 1.0).money > bill(made, subject, 1e9, 1.0).money
    assert 0.2 < made.mfu < 0.6
    assert made.ranks[0].seconds == made.compute
    with pytest.raises(ConfigError, match="pp"):
        laid_out(subject, {"pp": 64}, 64, H100, timing)


def test_a_layout_computes_what_one_device_does():
    """The time of one device is that of `predict`, to what its weights, read once, are worth."""
    from zoo.predict.roofline import predict

    model, timing = assemble(load_graph("llama_1b")), Assumed(H100, "bfloat16")
    train = replace(TrainSection(batch_size=4, dtype="bfloat16"), loss_chunks=1)
    made = laid_out(Subject(model, train, 1024), {"dp_shard": 1}, 1, H100, timing)
    alone = predict(zoo.estimate(model, batch_size=4, seq_len=1024), timing)
    assert 1e3 * made.compute == pytest.approx(alone.total, rel=0.02)


@pytest.mark.parametrize(
    "text, number", [("10B", 1e10), ("300m", 3e8), ("1e9", 1e9), ("1.5T", 1.5e12), ("10_000", 1e4)]
)
def test_amounts(text, number):
    assert amount(text, "--tokens") == number


@pytest.mark.parametrize("text", ["", "many", "-3", "0", "10X", "1.2.3"])
def test_amounts_that_are_none(text):
    with pytest.raises(ConfigError, match=r"--tokens .*: write a number, as in 10B"):
        amount(text, "--tokens")


def test_a_loop_holds_what_one_call_moves():
    """The tokens of a loop with a ring of states go through it one after another."""
    model = assemble(load_graph("huginn_small"))
    report = zoo.estimate(model, batch_size=1, seq_len=1024, mode="prefill")
    need = needed(model, report, TrainSection())(1, 1024)
    held = 4 * report.params + report.state_bytes
    assert held < need < held + 2**25 < held + max(n.bytes_read for n in report.nodes)
