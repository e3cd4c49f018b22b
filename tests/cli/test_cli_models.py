"""zoo build and profile."""

from __future__ import annotations

import json

import pytest
import torch

import zoo as package
from zoo.cost import NodeCost
from zoo.errors import ZooError
from zoo.graph.spec import Spec
from zoo.measure import compiled
from zoo.measure import run as measure
from zoo.views.folding import fold, spans


def test_build_json_is_the_estimate(zoo, tiny):
    document = json.loads(zoo("build", tiny, "--json").out)
    report = package.estimate(tiny, batch_size=1, seq_len=8)
    assert (document["params"], document["active_params"]) == (report.params, report.active_params)
    assert [(n["path"], n["block"], n["params"]) for n in document["nodes"]] == [
        (n.path, n.block, n.params) for n in report.nodes
    ]
    assert document["params"] == sum(p.numel() for p in package.build(tiny).parameters())
    assert document["layers"] == 4 and document["saved"] is None


def test_build_folds_equal_layers(zoo, tiny):
    out = zoo("build", tiny).out
    line = next(x for x in out.splitlines() if "swiglu" in x)
    assert line.startswith("0-2") and " 3 " in line
    assert "parameters" in out and "100.0%" not in out


def test_build_takes_overrides_and_options_in_any_order(zoo, tiny):
    one = json.loads(zoo("build", tiny, "dim=64", "--json", "trunk[0].repeat=5").out)
    assert one["dim"] == 64 and one["layers"] == 6


def test_build_saves_a_model_that_loads(zoo, tiny, tmp_path):
    out = tmp_path / "model"
    assert f"saved in {out}" in zoo("build", tiny, "--out", out, "--seed", 3).out
    tokens = torch.randint(256, (1, 8))
    assert torch.equal(package.from_pretrained(out)(tokens), package.build(tiny, seed=3)(tokens))
    assert "cannot save" in zoo("build", tiny, "--out", "/proc/nowhere", code=1).err


def test_build_tells_every_mistake_with_its_place(zoo, tmp_path):
    path = tmp_path / "wrong.yaml"
    path.write_text("dim: 32\nvocab_size: 257\ntrunk:\n  - swiglu\n  - {swiglu: {hiden_dim: 3}}\n  - nothing\n")
    printed = zoo("build", path, "--json", code=2)
    assert printed.out == "" and len(printed.err.splitlines()) == 2
    assert f"{path}:5:15 trunk[1].swiglu.hiden_dim" in printed.err and "did you mean hidden_dim" in printed.err
    assert f"{path}:6:5 trunk[2]" in printed.err
    assert "did you mean llama_1b" in zoo("build", "llama_2b", code=2).err


def test_large_models_are_built_without_memory(zoo):
    document = json.loads(zoo("build", "llama_1b", "--json").out)
    assert 1.1e9 < document["params"] < 1.4e9


@pytest.mark.parametrize("mode", ["train", "prefill", "decode"])
def test_profile_measures_every_block(zoo, tiny, mode):
    document = json.loads(zoo("profile", tiny, "--mode", mode, "--seq", "16,24", "--json").out)
    assert [r["seq_len"] for r in document["runs"]] == [16, 24]
    for run in document["runs"]:
        context = 1024 if mode == "decode" else 0
        report = package.estimate(tiny, batch_size=1, seq_len=run["seq_len"], context_len=context, mode=mode)
        assert run["flops"] == report.flops and run["not_measured"] is None
        blocks = {n.path for n in report.nodes if n.block != "fixed"}
        assert set(run["measured"]["nodes"]) == blocks
        assert 0 < sum(run["measured"]["nodes"].values()) <= run["measured"]["total"] * 1.5


def test_profile_measures_a_model_with_every_combinator(zoo, tmp_path):
    path = tmp_path / "all.yaml"
    path.write_text(
        "name: all\ndim: 32\nvocab_size: 64\ntrunk:\n"
        "  - {parallel: [{mlp: {}}, swiglu], merge: gated, norm: rms}\n"
        "  - {route: [{mlp: {}}], router: {mod: {capacity: 0.5}}}\n"
        "  - {swiglu: {}, share: top}\n  - {share: top}\n"
        "  - {loop: 2, of: [{mlp: {}}], router: {expert_choice: {capacity: [1.0, 0.5]}}}\n"
    )
    for mode in ("train", "decode"):
        run = json.loads(zoo("profile", path, "--mode", mode, "--batch", 2, "--seq", 16, "--json").out)["runs"][0]
        measured = run["measured"]["nodes"]
        assert {n["path"] for n in run["nodes"]} - set(measured) == {
            "layers.0.merge",
            "layers.1.router",
            "layers.4.router",
        }
        # sites of shared weights bear equal parts
        assert measured["layers.2"] == pytest.approx(measured["layers.3"])


def test_profile_table(zoo, tiny):
    out = zoo("profile", tiny, "--seq", 16).out
    assert all(word in out for word in ("FLOPs", "activations", "ms", "the rest", "total", "tokens/s"))
    assert all(word in out for word in ("forward", "backward", "peak", "memory: "))
    out = zoo("profile", tiny, "trunk[0].of=[{attention: {num_heads: 2}}]", "--seq", 16).out
    assert "\nkernels\n" in out and "\n  attention: " in out
    assert "state" in zoo("profile", tiny, "--mode", "decode", "--no-measure").out


def test_profile_predicts_only_what_is_too_large(zoo, monkeypatch, tiny):
    printed = zoo("profile", "llama_1b", "--seq", 8192)
    assert "predicted only: a pass" in printed.err and " ms" not in printed.out
    document = json.loads(zoo("profile", "llama_1b", "--seq", 8192, "--json").out)
    assert document["runs"][0]["measured"] is None and "a pass" in document["runs"][0]["not_measured"]
    monkeypatch.setattr(measure, "free_memory", lambda device: 1000)
    assert "cannot be measured here" in zoo("profile", tiny, "--seq", 16, "--measure", code=1).err
    assert "predicted only" in zoo("profile", tiny, "--seq", 16).err


def test_profile_compares_with_compiled_passes_and_traces(zoo, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    trace = tmp_path / "new" / "trace.json"
    printed = zoo("profile", tiny, "--seq", 16, "--compile", "--trace", trace)
    assert "times as quick" in printed.out and "kept for backward" in printed.out and not printed.err
    names = {e.get("name") for e in json.loads(trace.read_text())["traceEvents"]}
    assert {"layers.0.0 forward", "layers.0.0 backward"} <= names
    run = json.loads(zoo("profile", tiny, "--seq", 16, "--compile", "--json").out)["runs"][0]
    measured = run["measured"]
    assert measured["compiled"]["ratio"] > 0 and measured["memory"]["nodes"].keys() == measured["nodes"].keys()
    monkeypatch.setattr(compiled, "BACKEND", "nobody")
    assert "torch.compile fails: " in zoo("profile", tiny, "--seq", 16, "--compile").out


@pytest.mark.parametrize(
    "args, words",
    [
        (("--trace", "x.json", "--seq", "16,32"), "--seq takes one number"),
        (("--trace", "x.json", "--no-measure"), "not with --no-measure"),
        (("--compile", "--device", "h100"), "H100 is not here"),
        (("--trace", "/proc/nowhere/x.json"), "cannot write"),
    ],
)
def test_profile_measures_what_it_compiles_or_traces(zoo, tiny, args, words):
    assert words in zoo("profile", tiny, *args, code=2).err


def test_profile_refuses_what_makes_no_sense(zoo, tiny):
    assert "write numbers" in zoo("profile", tiny, "--seq", "ten", code=2).err
    assert "seq_len" in zoo("profile", tiny, "--seq", "0", code=2).err
    assert "unknown; one of H100" in zoo("profile", tiny, "--device", "toaster", code=2).err
    if not torch.cuda.is_available():
        assert "no CUDA device" in zoo("profile", tiny, "--device", "cuda", code=1).err


def test_slow_passes_are_measured_on_request_only():
    report = package.estimate("llama_1b", batch_size=1, seq_len=4096, mode="prefill")
    assert "--measure insists" in measure.too_large(report, "cpu", False) or "free" in measure.too_large(
        report, "cpu", False
    )
    huge = package.estimate("llama_1b", batch_size=4096, seq_len=65536)
    with pytest.raises(ZooError, match="free"):
        measure.too_large(huge, "cpu", True)


def test_spans():
    assert spans([0, 1, 2, 5]) == "0-2, 5"
    assert spans([0, 2, 4, 6, 7]) == "0-6 by 2, 7"
    assert spans([0, 4, 8]) == "0, 4, 8"
    assert spans([3]) == "3"


def test_fold_keeps_unequal_layers_apart():
    def node(path: str) -> NodeCost:
        return NodeCost(path, "mlp", 1, 1, 1, 1, 1, 1, 1, 1, 1)

    trunk = [Spec("mlp", kind="ffn", options={"hidden_dim": h}) for h in (8, 16, 8)]
    rows = fold([node("tok_embeddings"), *(node(f"layers.{i}") for i in range(3)), node("lm_head")], trunk)
    assert [(r.layers, len(r.sites)) for r in rows] == [("", 1), ("0, 2", 2), ("1", 1), ("", 1)]
