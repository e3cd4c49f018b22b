"""Graphs as nested boxes."""

from __future__ import annotations

import pytest

import zoo
from zoo.architectures.storage import assemble
from zoo.cost import estimate
from zoo.graph.loader import load_graph
from zoo.views.drawing import Box, draw, fold
from zoo.views.quantities import totals, values


def drawn(config, *overrides):
    graph = load_graph(config, overrides)
    report = estimate(assemble(graph), batch_size=1, seq_len=64)
    costs = [values(node, {}) for node in report.nodes]
    return report, draw(report, graph, costs, lambda path: [])


def leaf(name):
    return Box(name, name, values={"flops": 1})


def words(boxes):
    return [f"{b.times}x{b.name or '(' + ' '.join(words(b.children)) + ')'}" for b in boxes]


@pytest.mark.parametrize(
    "letters, expected",
    [
        ("aaaa", ["4xa"]),
        ("ababab", ["3x(1xa 1xb)"]),
        ("aabaab", ["2x(2xa 1xb)"]),
        ("abcde", ["1xa", "1xb", "1xc", "1xd", "1xe"]),
        ("xaabaaby", ["1xx", "2x(2xa 1xb)", "1xy"]),
        ("abbbb", ["1xa", "4xb"]),
        ("", []),
    ],
)
def test_repeats_become_one_with_their_number(letters, expected):
    found = fold([leaf(letter) for letter in letters])
    assert words(found) == expected
    assert sum(box.values["flops"] for top in found for box in top.leaves()) == len(letters)


@pytest.mark.parametrize("name", ["hydra_small", "huginn_small", "hnet_small", "zamba2_small", "jamba_52b", "vit_small",
                                  "block_transformer_small", "raptor_small", "mod_small"])  # fmt: skip
def test_every_node_is_drawn_once_with_all_its_cost(name):
    report, tree = drawn(name)
    for key in ("params", "flops", "bytes_read", "activation_bytes"):
        of_nodes = sum(getattr(node, key) for node in report.nodes)
        if key != "bytes_read":
            assert sum(box.values[key] for box in tree.leaves()) == of_nodes, key
    known = {node.path for node in report.nodes}
    assert {box.path for box in tree.leaves()} <= known
    assert len(list(tree.leaves())) <= len(report.nodes)


def named(box, name):
    return next(b for b in [box, *[x for c in box.children for x in [c, *below(c)]]] if b.name == name)


def below(box):
    return [x for c in box.children for x in [c, *below(c)]]


def test_shapes():
    _, tree = drawn("hydra_small")
    first = tree.children[1]
    assert (first.shape, first.columns, first.note) == ("branches", 2, "gated")
    assert [c.name for c in first.children] == ["mamba2", "chunk_moe", "merge gated"]
    loop = named(tree, "loop")
    assert (loop.shape, loop.note, loop.layers) == ("loop", "2 steps", [3])
    assert [b.name for b in loop.leaves()] == ["attention", "swiglu", "expert_choice"]
    assert {b.note for b in loop.leaves() if b.name in ("attention", "swiglu")} == {"2 calls"}
    _, tree = drawn("hnet_small")
    assert [c.name for c in named(tree, "hierarchy").children][:3] == ["encoder", "dynamic_chunks", "main"]
    _, tree = drawn("jamba_52b")  # a period of eight layers, four times
    (body,) = [b for b in tree.children if b.times > 1]
    assert body.times == 4 and body.as_dict()["layers"].startswith("0-")
    _, tree = drawn("llama_1b")
    assert [(b.name, b.times) for b in tree.children] == [("embedding", 1), ("layer", 16), ("norm", 1), ("head", 1)]
    assert tree.children[1].as_dict()["layers"] == "0-15"


def test_totals_count_shared_weights_once():
    trunk = [{"repeat": 3, "tie": "all", "of": ["swiglu"]}]
    report = zoo.estimate({"dim": 32, "vocab_size": 64, "trunk": trunk}, batch_size=1, seq_len=64)
    assert totals(report, None, None)["params"] == report.params < sum(n.params for n in report.nodes)
