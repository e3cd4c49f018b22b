"""Two models beside each other."""

from __future__ import annotations

from zoo.architectures.storage import assemble
from zoo.cost import estimate
from zoo.graph.loader import load_graph
from zoo.predict.roofline import Prediction
from zoo.views.compare import compare
from zoo.views.profile import Seen

LAYER = [{"attention": {"num_heads": 4}}, {"swiglu": {"hidden_dim": 64}}]


def seen(trunk, **changes):
    graph = load_graph({"name": "m", "dim": 32, "vocab_size": 64, "trunk": trunk, **changes})
    report = estimate(assemble(graph), batch_size=2, seq_len=16)
    times = {node.path: 1e-9 * node.flops for node in report.nodes}
    return Seen(graph, report, Prediction(sum(times.values()), times, 0.0, False, ()))


def test_a_model_equals_itself():
    model = seen([{"repeat": 3, "of": LAYER}])
    found = compare(model, model)
    assert not found.totals[0].keys() ^ found.totals[1].keys()
    assert not found.quantities and not found.nodes
    assert found.equal.startswith("equal: parameters, ") and "8 of 9" not in found.equal
    assert found.equal.endswith("9 of 9 nodes: tok_embeddings, norm, lm_head, of layers 0-2")


def test_a_layer_put_in_moves_no_other():
    small = seen([{"repeat": 3, "of": LAYER}])
    large = seen([LAYER, {"gla": {"num_heads": 2}}, {"repeat": 2, "of": LAYER}])
    for a, b, blocks in ((small, large, (None, "gla")), (large, small, ("gla", None))):
        (row,) = compare(a, b).nodes
        assert (row.at, row.blocks, row.times) == ("layer 1: 0", blocks, 1) or row.at == "layer 1"
        sign = 1 if blocks[0] is None else -1
        assert row.change("params") == sign * (large.report.params - small.report.params)


def test_what_differs_is_folded_and_ratios_are_of_totals():
    changed = [{"attention": {"num_heads": 4}}, {"swiglu": {"hidden_dim": 128}}]
    a, b = seen([{"repeat": 4, "of": LAYER}]), seen([{"repeat": 4, "of": changed}])
    found = compare(a, b)
    (row,) = found.nodes
    assert (row.at, row.blocks, row.times) == ("layers 0-3: 1", ("swiglu", "swiglu"), 4)
    assert row.change("params") == 4 * 3 * 32 * 64 == b.report.params - a.report.params
    assert found.ratio("params") == b.report.params / a.report.params
    assert found.equal == "equal: 7 of 11 nodes: tok_embeddings, norm, lm_head, of layers 0-3"
    document = found.as_dict()
    assert [t["key"] for t in document["totals"]][:2] == ["params", "flops"]
    assert document["rows"][0]["change"]["params"] == row.change("params")


def test_other_blocks_and_other_ends():
    a = seen([{"repeat": 2, "of": LAYER}])
    b = seen([{"repeat": 2, "of": [{"gla": {"num_heads": 2}}, {"swiglu": {"hidden_dim": 64}}]}], vocab_size=128)
    found = {row.at: row for row in compare(a, b).nodes}
    assert found["layers 0-1: 0"].blocks == ("attention", "gla")
    assert found["tok_embeddings"].change("params") == 64 * 32
    assert found["lm_head"].change("flops") > 0 and set(found) == {"layers 0-1: 0", "tok_embeddings", "lm_head"}
