"""What is timed: every case and every layer computes the same function as its peers."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

from zoo.bench import layers, ops, problems, session, sparse
from zoo.bench.cases import CASES, of
from zoo.bench.groups import TOLERANCE, Settings, difference
from zoo.bench.problems import Draw
from zoo.kernels import dispatch
from zoo.kernels.delta_rule import delta_rule
from zoo.kernels.linear_attention import linear_attention

SETTINGS = Settings()
T = 70
WHATS = ("forward", "forward+backward", "step")


def agree(contest) -> list[str]:
    """Every candidate that can run gives the first one's results; the names of those that did."""
    first, names = None, []
    for candidate in contest.candidates:
        if candidate.runner is None:
            continue
        if candidate.runner.prepare:
            candidate.runner.prepare()
        found = candidate.runner.run()
        found = found if isinstance(found, (tuple, list)) else [found]
        first = first or found
        assert difference(found, first) < TOLERANCE[torch.float32], candidate.name
        names.append(candidate.name)
    return names


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_a_case_and_its_peers_agree(case):
    for what in WHATS:
        if (what == "step" and not case.step) or (what == "forward+backward" and not case.backward):
            continue
        contest = ops.contest(case, what, T, SETTINGS, ("auto",))
        theirs = case.step_peers if what == "step" else case.peers
        local = [name for name, path in theirs if "transformers" in path or "sdpa" in path]
        assert agree(contest) == ["zoo", *local]
        assert contest.moved > 0
        missing = {c.problem for c in contest.candidates if c.runner is None}
        assert all("is not installed" in m or "need a GPU" in m for m in missing)


def test_rows_of_an_op_are_raced_or_say_why_not():
    contest = ops.contest(of("delta_rule")[0], "forward", T, SETTINGS)
    names = {c.name for c in contest.candidates}
    assert names >= set(dispatch.backends("delta_rule"))
    refused = {c.name: c.problem for c in contest.candidates if c.runner is None}
    assert refused["fla"] and "chunked" not in refused
    assert {c.name for c in contest.candidates if c.by == "zoo"} >= {"chunked", "reference"}


@pytest.mark.parametrize("layer", layers.LAYERS, ids=lambda layer: layer.block)
def test_a_layer_and_its_peer_agree(layer):
    for what in WHATS:
        contest = layers.contest(layer, what, 20, SETTINGS)
        assert agree(contest) == ["zoo", *(f"transformers{v and ', ' + v}" for v in layer.variants)]
        # again: a cache that has grown is put back
        assert what != "step" or agree(contest)
        assert contest.flops > 0 and contest.moved > 0


def test_a_peer_with_other_weights_is_found(monkeypatch):
    from zoo.bench.peers import transformers

    def shifted(ours, positions, changes):
        peer = transformers.layer_lightning(ours, positions, changes)
        with torch.no_grad():
            peer.module.out_proj.weight.mul_(1.1)
        return peer

    monkeypatch.setattr(transformers, "layer_attention", shifted)
    layer = next(layer for layer in layers.LAYERS if layer.block == "lightning")
    monkeypatch.setattr(layers, "LAYERS", (layer,))
    contest = layers.contest(layers.LayerCase("lightning", layer.options, "attention", layer.wanted), "forward", 9,
                             SETTINGS)  # fmt: skip
    with pytest.raises(AssertionError, match="transformers"):
        agree(contest)


def test_layers_that_are_wanted():
    groups = list(layers.groups(layers.names(), SETTINGS))
    wanted = {(g.case, g.what): g.wanted for g in groups if g.wanted}
    assert wanted["mamba", "forward"] == 3.0 and wanted["mla", "step"] == 2.0
    assert wanted["kda", "forward+backward"] == 4.0
    assert {(g.what, g.seq) for g in groups} == {("forward", 2048), ("forward", 512), ("forward+backward", 2048),
                                                ("forward+backward", 512), ("step", 2048)}  # fmt: skip
    assert all(g.wanted is None for g in groups if g.seq == 512)
    short = list(layers.groups(["mla"], SETTINGS, (64,)))
    assert [(g.what, g.seq, g.context) for g in short] == [("forward", 64, 0), ("forward+backward", 64, 0),
                                                           ("step", 64, 64)]  # fmt: skip


@pytest.mark.parametrize(("tile", "block"), [(32, 32), (1, 16)])
@pytest.mark.parametrize("density", [0.25, 1.0])
def test_the_density_of_a_list_is_what_it_says(tile, block, density):
    draw = Draw("cpu", torch.float32)
    ids = problems.random_blocks(draw, 200, 2, tile, block, density, 3)
    for i in range(ids.shape[2]):
        last = min((i + 1) * tile - 1, 199) // block
        kept = ids[:, :, i]
        assert (kept >= 0).sum(-1).unique().tolist() == [-(-int(density * 100) * (last + 1) // 100)]
        assert (kept.max(-1).values == last).all()  # its own block is among them, and none behind it
        row = [x for x in kept[0, 0].tolist() if x >= 0]
        assert row == sorted(set(row)) and kept[0, 0].tolist()[: len(row)] == row


def test_sparse_groups():
    groups = list(sparse.groups(SETTINGS))
    assert [g.wanted for g in groups] == [2.5, 1.0, None, None] and {g.seq for g in groups} == {8192}
    agreeing = [c for c in groups[0].build(256).candidates if c.alike and c.name != "reference"]
    assert {c.name for c in agreeing} >= {"chunked"}
    assert [c.name for c in groups[0].build(256).candidates if not c.alike] == ["SDPA, dense causal"]


def test_the_adapter_of_fla_names_its_arguments_right(monkeypatch):
    """fla's chunk ops with the signatures they have, computed by ours."""
    from zoo.bench.peers import fla as adapter

    def chunk_gla(q, k, v, g, scale=None, initial_state=None, output_final_state=False, state_v_first=False):
        return linear_attention(q, k, v, g, scale=scale)[0], None

    def chunk_simple_gla(q, k, v, g=None, g_gamma=None, scale=None, initial_state=None, output_final_state=False):
        return linear_attention(q, k, v, g_gamma if g is None else g, scale=scale)[0], None

    def chunk_delta(q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False):
        return delta_rule(q, k, v, beta, g, scale=q.shape[-1] ** -0.5 if scale is None else scale)[0], None

    ops_of = {"gla": chunk_gla, "simple_gla": chunk_simple_gla, "gated_delta_rule": chunk_delta, "kda": chunk_delta}
    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for name, fn in ops_of.items():
        module = ModuleType(f"fla.ops.{name}")
        setattr(module, f"chunk_{name}", fn)
        monkeypatch.setitem(sys.modules, f"fla.ops.{name}", module)
    monkeypatch.setattr(adapter, "problem", lambda device: None)
    raced = []
    for case in CASES:
        if any("peers.fla" in path for _, path in case.peers):
            raced += agree(ops.contest(case, "forward+backward", T, SETTINGS, ("auto",)))
    assert [n for n in raced if n.startswith("fla")] == [
        "fla chunk_simple_gla", "fla chunk_simple_gla", "fla chunk_gla", "fla chunk_gated_delta_rule", "fla chunk_kda",
    ]  # fmt: skip


def test_the_adapter_of_mamba_ssm_names_its_arguments_right(monkeypatch):
    from zoo.bench.peers import mamba_ssm as adapter
    from zoo.kernels.selective_scan import selective_scan

    def selective_scan_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False,
                          return_last_state=False):  # fmt: skip
        assert u.is_contiguous() and delta.is_contiguous() and B.is_contiguous()
        return selective_scan(u.mT, delta.mT, A, B.mT, C.mT)[0].mT

    module = ModuleType("mamba_ssm.ops.selective_scan_interface")
    module.selective_scan_fn = selective_scan_fn
    for name in ("mamba_ssm", "mamba_ssm.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(adapter, "problem", lambda device: None)
    assert agree(ops.contest(of("selective_scan")[0], "forward+backward", T, SETTINGS, ("auto",)))[-1].startswith(
        "mamba_ssm"
    )


def test_lengths():
    assert session.lengths("512,2048") == (512, 2048) and session.lengths(None) == ()
