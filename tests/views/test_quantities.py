"""Quantities of nodes, of several nodes, and of passes."""

from __future__ import annotations

import csv
import io

import pytest

from zoo.architectures.storage import assemble
from zoo.cost import estimate
from zoo.graph.loader import load_graph
from zoo.measure.memory import Memory
from zoo.measure.run import Measured
from zoo.predict.roofline import Prediction
from zoo.views.profile import Seen
from zoo.views.quantities import gathered, kernels, shown
from zoo.views.sheet import nodes_csv

TRUNK = [{"repeat": 2, "of": [{"attention": {"num_heads": 2}}, "swiglu"]}]


def seen(trunk=TRUNK):
    """Predicted: a millisecond a node. Measured: 1, 2, 3, ... ms, a quarter of it forward; but not the last node."""
    graph = load_graph({"name": "m", "dim": 32, "vocab_size": 64, "trunk": trunk})
    report = estimate(assemble(graph), batch_size=1, seq_len=16)
    paths = [n.path for n in report.nodes]
    nodes = {path: float(i + 1) for i, path in enumerate(paths[:-1])}
    phases = {"forward": {p: t / 4 for p, t in nodes.items()}, "backward": {p: 3 * t / 4 for p, t in nodes.items()}}
    memory = Memory(1000, 64, 32, {path: 10 * i for i, path in enumerate(nodes)})
    ran = {paths[1]: {"linear": ["aten", "onednn"], "rope": ["chunked"]}, paths[3]: {"linear": ["loop"]}}
    found = Measured(50.0, nodes, 5, 1, "x", 20.0, 30.0, phases, ran, memory)
    return Seen(graph, report, Prediction(10.0, dict.fromkeys(paths, 1.0), 1.0, True, ()), found)


def test_nodes_together():
    parts = [
        {"flops": 2, "peak_bytes": 7, "predicted": 1.0, "measured": 4.0, "predicted_over_measured": 0.25},
        {"flops": 3, "peak_bytes": 5, "predicted": 3.0, "measured": 1.0, "predicted_over_measured": 3.0},
    ]
    whole = {"flops": 5, "peak_bytes": 7, "predicted": 4.0, "measured": 5.0, "predicted_over_measured": 0.8}
    assert gathered(parts) == whole
    assert gathered([gathered(parts), {"flops": 1, "predicted": 1.0}])["predicted_over_measured"] == 1.0
    assert gathered([]) == {} and "predicted_over_measured" not in gathered([{"predicted": 1.0}])


def test_what_passes_tell():
    model = seen()
    first, *_, last = model.costs
    assert (first["measured"], first["forward"], first["backward"], first["peak_bytes"]) == (1.0, 0.25, 0.75, 0)
    assert model.costs[3]["predicted_over_measured"] == 1 / 4
    assert last["predicted"] == 1.0 and not {"measured", "forward", "peak_bytes", "predicted_over_measured"} & set(last)
    total = model.total
    assert [total[k] for k in ("measured", "forward", "backward", "peak_bytes")] == [50.0, 20.0, 30.0, 64]
    assert total["predicted_over_measured"] == 10 / 50
    names = [q.key for q in shown(total)]
    assert "active_params" not in names, "all of them are"
    assert names[-6:] == ["predicted", "measured", "forward", "backward", "predicted_over_measured", "peak_bytes"]
    assert "active_params" in [q.key for q in seen([{"moe": {"num_experts": 4, "top_k": 2}}]).quantities]


def test_kernels_are_named_by_op():
    model = seen()
    paths = [n.path for n in model.report.nodes]
    assert kernels(model.measured, paths[1]) == ["linear aten and onednn", "rope chunked"]
    assert kernels(model.measured, paths[1], paths[3]) == ["linear aten and onednn and loop", "rope chunked"]
    assert kernels(model.measured, paths[0]) == kernels(None, paths[1]) == []


def test_the_sheet_has_every_measured_quantity():
    rows = list(csv.DictReader(io.StringIO(nodes_csv([seen()]))))
    assert [float(r["predicted_ms"]) for r in rows] == [1.0] * len(rows)
    assert [r["forward_ms"] for r in rows] == [str((i + 1) / 4) for i in range(len(rows) - 1)] + [""]
    assert [r["backward_ms"] for r in rows[:2]] == ["0.75", "1.5"] and rows[1]["peak_bytes"] == "10"
    assert [float(r["predicted_over_measured"]) for r in rows[:2]] == pytest.approx([1, 1 / 2])
    assert rows[1]["kernels"] == "linear aten and onednn, rope chunked" and rows[0]["kernels"] == ""
    assert {r["pass_measured_ms"] for r in rows} == {"50.0"} and {r["pass_compiled_ms"] for r in rows} == {""}
