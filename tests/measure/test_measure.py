"""Measured passes: times, memory, kernels, compiled, traces; and the model as it was before."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import zoo
import zoo.kernels.flops  # formulas that torch lacks
from zoo.measure import compiled
from zoo.measure.memory import memory_of
from zoo.measure.passes import Pass, pass_of
from zoo.measure.run import measure_model
from zoo.measure.times import Times
from zoo.measure.trace import TRACK, write_trace
from zoo.measure.visits import visited

ATTENTION = {"attention": {"num_heads": 2}}


def model_of(*trunk: Any, **more: Any):
    document = {"name": "x", "architecture": "causal_lm", "dim": 32, "vocab_size": 64, "trunk": list(trunk)}
    return zoo.build(document | more)


@pytest.fixture(scope="module")
def llama():
    return model_of({"repeat": 2, "of": [ATTENTION, "swiglu"]})


@pytest.fixture(scope="module")
def mixed():
    """Shared weights, a router, branches, steps."""
    return model_of(
        {"swiglu": {}, "share": "top"},
        {"share": "top"},
        {"parallel": ["gla", "mlp"], "merge": "gated", "norm": "rms"},
        {"route": [{"mlp": {}}], "router": {"mod": {"capacity": 0.5}}},
        {"loop": {"steps": 2}, "of": ["swiglu"]},
    )


def vision():
    return zoo.build({
        "name": "v", "architecture": "vision", "dim": 32, "norm": "layer", "data": {"source": "shapes"},
        "vision": {"image_size": 16, "patch_size": 8, "num_classes": 8},
        "trunk": [{"repeat": 2, "of": [{"attention": {"num_heads": 2, "causal": False, "rope": False}}, "mlp"]}],
    })  # fmt: skip


def measured(model, mode="train", tokens=16, before=0):
    """By a clock that moves a millisecond whenever somebody looks."""
    report = zoo.estimate(model, batch_size=2, seq_len=tokens, context_len=before, mode=mode)
    ticks = itertools.count()
    return report, measure_model(model, report, "cpu", now=lambda: 1e-3 * next(ticks))


# --------------------------------------------------------------------------------------------- times
@pytest.mark.parametrize("mode", ["train", "prefill", "decode"])
@pytest.mark.parametrize("which", ["llama", "mixed"])
def test_parts_and_total(which, mode, request):
    report, found = measured(request.getfixturevalue(which), mode, before=8 if mode == "decode" else 0)
    forward, backward = found.phases["forward"], found.phases["backward"]
    assert found.total == pytest.approx(found.forward + found.backward)
    assert found.nodes == pytest.approx({p: forward[p] + backward.get(p, 0.0) for p in forward})
    assert sum(forward.values()) < found.forward and (mode != "train" or sum(backward.values()) < found.backward)
    assert bool(found.backward) == (mode == "train") and set(backward) == (set(forward) if mode == "train" else set())
    seen = {n.path for n in report.nodes if not n.path.endswith(("merge", "router"))}
    assert set(found.nodes) == seen


def test_every_call_is_counted_once(llama, mixed):
    _, found = measured(llama)
    once = pytest.approx(2.0)  # of a norm and a block, or
    assert found.phases["forward"] == {
        p: once if p.startswith("layers") else pytest.approx(1.0) for p in found.nodes
    } == found.phases["backward"]  # fmt: skip
    # both sites of shared weights are called, and the body of a loop in every step
    _, found = measured(mixed)
    assert found.phases["backward"]["layers.0"] == once and found.phases["backward"]["layers.1"] == once
    assert found.phases["forward"]["layers.4.body.0"] == pytest.approx(4.0)


def test_vision_has_a_backward_of_the_embedding():
    model = vision()
    report = zoo.estimate(model, batch_size=2, seq_len=5, mode="train")
    found = measure_model(model, report, "cpu", enough=0.0)
    assert set(found.phases["backward"]) == {n.path for n in report.nodes}
    assert all(found.phases["backward"].values()) and found.backward > 0


def test_block_diffusion_is_measured_as_it_is_trained():
    """On two copies: the measured pass does the work that is predicted."""
    model = zoo.build({
        "dim": 32, "vocab_size": 24, "trunk": [{"attention": {"num_heads": 2}}, "swiglu"],
        "diffusion": {"recipe": "nbdiff", "block_size": 8},
    })  # fmt: skip
    report, found = measured(model, tokens=32)
    assert set(found.phases["backward"]) == {n.path for n in report.nodes}
    with FlopCounterMode(display=False) as counter:
        pass_of(model, report, "cpu").forward()
    assert 3 * counter.get_total_flops() == report.flops
    with pytest.raises(zoo.ConfigError, match="whole blocks of 8 tokens"):
        measured(model, tokens=20)


def test_a_gpu_is_waited_for_at_the_ends_only(monkeypatch, llama):
    heard = []

    class Event:
        moments = itertools.count()

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            heard.append("mark")
            self.at = next(self.moments)

        def elapsed_time(self, end):
            assert heard[-1] == "wait"
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: heard.append("wait"))
    once = pass_of(llama, zoo.estimate(llama, batch_size=1, seq_len=8, mode="train"), "cpu")
    clock = Times("cuda", lambda: 0.0)
    with visited(llama, clock) as end:
        total, forward = compiled.timed(once, clock, end)
    assert heard.count("wait") == 2 and heard[0] == heard[-1] == "wait"
    spent = clock.collect()
    assert sum(spent["forward"].values()) < forward < total
    assert spent["backward"]["layers.0.0"] == pytest.approx(2e-3)


# ------------------------------------------------------------------------------------ nothing changes
@pytest.mark.parametrize("which", ["llama", "mixed"])
def test_measuring_changes_nothing(which, request):
    model = request.getfixturevalue(which)
    report = zoo.estimate(model, batch_size=2, seq_len=16, mode="train")

    class Silent:
        def enter(self, paths, phase):
            pass

        def leave(self, paths, phase, mark):
            pass

    def results():
        once = pass_of(model, report, "cpu")
        once.prepare()
        loss = once.forward()
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters())]

    before = results()
    with visited(model, Silent()) as end:
        inside = results()
        end()
    weights = [p.detach().clone() for p in model.parameters()]
    measure_model(model, report, "cpu", enough=0.0)
    memory_of(model, pass_of(model, report, "cpu"), "cpu")
    assert all(torch.equal(a, b) for a, b in zip(before, results(), strict=True))
    # gradients of a tensor that several parts read are added in another order
    assert torch.equal(before[0], inside[0])
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(before, inside, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks]
    assert not hooks


def test_parts_inside_parts_belong_to_those():
    class Inner(nn.Linear):
        pass

    class Outer(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.readout = (inner,)

        def forward(self, x):
            return self.readout[0](x) * 2

    inner = Inner(4, 4)
    model = hand_made(first=Scaled(4), outer=Outer(inner), inner=inner)
    heard = []
    visitor = SimpleNamespace(
        enter=lambda paths, phase: heard.append((*paths, phase)), leave=lambda paths, phase, mark: heard.append("end")
    )
    with visited(model, visitor) as end:
        model.inner(model.outer(model.first(torch.ones(4)))).sum().backward()
        end()
    order = [(name, "forward") for name in ("first", "outer", "inner")]
    order += [(name, "backward") for name in ("inner", "outer", "first")]
    assert heard == [x for step in order for x in (step, "end")]


# -------------------------------------------------------------------------------------------- memory
class Scaled(nn.Module):
    """w x: keeps x, w."""

    def __init__(self, n):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))

    def forward(self, x):
        return x * self.weight


class Wasteful(nn.Module):
    """relu(x), with a detour that needs 3 n numbers for a while."""

    def forward(self, x):
        wide = torch.empty(3 * len(x))
        del wide
        return torch.relu(x)


def hand_made(**modules: nn.Module) -> Any:
    """What of a model is asked for where it is visited: nodes are its modules, without a trunk."""
    model: Any = nn.ModuleDict(modules)
    for name, module in modules.items():
        setattr(model, name, module)
    model.leaves = lambda *args: ()
    model.ends = lambda *args: [SimpleNamespace(path=name, module=module) for name, module in modules.items()]
    model.embedding = next(iter(modules))
    return model


def test_memory_of_a_model_made_by_hand():
    n, number = 1000, 4  # bytes
    model, x = hand_made(first=Scaled(n), second=Wasteful()), torch.ones(n)
    once = Pass(
        lambda: model.zero_grad(set_to_none=True), lambda: model.second(model.first(x)).sum(), held=2 * n * number
    )
    once()
    found = memory_of(model, once, "cpu")
    row = n * number
    assert found.held == 2 * row
    assert found.peak == 4 * row  # the first one's output and 3 n
    assert found.kept == row + number  # relu's output and the loss
    assert found.nodes == {"first": row, "second": 3 * row}
    # backward: relu's gradient is new while its output is there; then that of the weight beside it
    backward = memory_of(model, Pass(once.prepare, lambda: model.first(x).relu().sum(), 0), "cpu")
    assert backward.peak == 2 * row + 2 * number and backward.nodes == {"first": row}


def test_memory_of_a_gpu_is_that_of_its_allocator(monkeypatch):
    """An allocator that takes 10 bytes in every forward, 5 for a while, and gives all back in backward."""
    now = SimpleNamespace(used=100, most=100)

    def take(size):
        now.used += size
        now.most = max(now.most, now.used)

    class Takes(Scaled):
        def forward(self, x):
            take(15)
            take(-5)
            out = super().forward(x)
            out.register_hook(self.back)
            return out

        def back(self, grad):
            take(7)
            take(-17)

    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: now.used)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: now.most)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: setattr(now, "most", now.used))
    model = hand_made(first=Takes(4), second=Takes(4))
    once = Pass(lambda: None, lambda: model.second(model.first(torch.ones(4))).sum(), held=64)
    found = memory_of(model, once, "cuda")
    assert (found.held, found.peak, found.kept) == (64, 27, 20)
    assert found.nodes["first"] == found.nodes["second"] == 15


def test_memory_kept_is_what_is_predicted():
    model = model_of({"repeat": 3, "of": [ATTENTION, "swiglu"]}, dim=64)
    report = zoo.estimate(model, batch_size=4, seq_len=64, mode="train")
    once = pass_of(model, report, "cpu")
    once()
    found = memory_of(model, once, "cpu")
    assert found.kept == pytest.approx(report.activation_bytes, rel=0.05)
    assert found.held == 4 * report.params + sum(b.nbytes for b in model.buffers())
    assert set(found.nodes) == {n.path for n in report.nodes} and max(found.nodes.values()) < found.peak


def test_a_state_is_held_before_decoding():
    model = model_of(ATTENTION)
    report = zoo.estimate(model, batch_size=2, seq_len=1, context_len=32, mode="decode")
    once = pass_of(model, report, "cpu")
    once()
    found = memory_of(model, once, "cpu")
    weights = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert found.held == weights + model.init_state(2, 33).nbytes and 0 < found.peak < 16384


# ------------------------------------------------------------------------------------------- kernels
def test_kernels_are_those_that_ran():
    model = model_of("gla", "swiglu")
    _, found = measured(model)
    assert "linear_attention" in found.kernels["layers.0"] and "reference" not in str(found.kernels)
    with zoo.kernels.use(linear_attention="reference"):
        _, found = measured(model)
    assert found.kernels["layers.0"]["linear_attention"] == ["reference"]
    assert "linear_attention" not in found.kernels.get("layers.1", {})


# ------------------------------------------------------------------------------------------ compiled
def test_compiled_passes(monkeypatch, llama):
    once = pass_of(llama, zoo.estimate(llama, batch_size=1, seq_len=8, mode="train"), "cpu")
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    found = compiled.against_compiled(llama, once, "cpu")
    assert found["failure"] is None and found["ratio"] == pytest.approx(found["eager"] / found["compiled"])

    def broken(graph, inputs):
        raise RuntimeError("no such\ninstruction")

    monkeypatch.setattr(compiled, "BACKEND", broken)
    found = compiled.against_compiled(llama, once, "cpu")
    assert found["compiled"] is None and found["failure"].startswith("torch.compile fails: ")
    assert "\n" not in found["failure"] and "no such" in found["failure"]
    assert all(layer._compiled_call_impl is None for layer in llama.layers)


# --------------------------------------------------------------------------------------------- trace
@pytest.mark.parametrize("mode", ["train", "prefill"])
def test_a_trace_names_the_nodes(mixed, tmp_path, mode):
    report = zoo.estimate(mixed, batch_size=2, seq_len=16, mode=mode)
    write_trace(mixed, pass_of(mixed, report, "cpu"), "cpu", tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    ranges = [e for e in events if e.get("cat") == "user_annotation"]
    names = {e["name"] for e in ranges}
    assert {"layers.0, layers.1 forward", "layers.4.body.0 forward", "norm forward", "lm_head forward"} <= names
    assert ("tok_embeddings backward" in names) == ("layers.2.1 backward" in names) == (mode == "train")
    assert {e["tid"] == TRACK for e in ranges if e["name"].endswith("backward")} <= {True}
    # on every track what begins inside a range ends inside it
    for track in {e["tid"] for e in ranges}:
        ends: list[float] = []
        for e in sorted((e for e in events if e.get("ph") == "X" and e["tid"] == track), key=lambda e: e["ts"]):
            ends = [end for end in ends if end > e["ts"]]
            assert all(e["ts"] + e["dur"] <= end + 0.01 for end in ends), e["name"]
            ends.append(e["ts"] + e["dur"])
