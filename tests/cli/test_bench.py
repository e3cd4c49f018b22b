"""`zoo bench` from the command line, at tiny sizes; nothing here depends on how long anything takes."""

from __future__ import annotations

import json

import pytest

from zoo.bench import session
from zoo.bench.problems import Draw
from zoo.kernels import dispatch


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    from zoo.bench import groups, machine

    monkeypatch.setattr(groups.gc, "collect", lambda: 0)

    measure = machine.peaks
    monkeypatch.setattr(machine, "peaks", lambda device, dtype: measure(device, dtype, width=64, rounds=1))


def test_help(zoo):
    out = zoo("bench", "--help").out
    assert out.startswith("Usage: zoo bench") and "--json" in out and "--tune" in out


def test_an_op_as_json(zoo):
    found = json.loads(zoo("bench", "rope", "--seq", 16, "--rounds", 1, "--json").out)
    assert set(found) == {"bench", "date", "machine", "settings", "peaks", "groups", "command"}
    assert found["settings"] == {"device": "cpu", "dtype": "float32", "rounds": 1, "compiled": False, "peer": None}
    assert found["machine"]["threads"] == 1 and found["machine"]["versions"]["torch"]
    assert set(found["peaks"]) == {"gflops", "copy_gb_s", "stream_gb_s"}
    assert [(g["case"], g["what"], g["seq"]) for g in found["groups"]] == [
        ("rope", "forward", 16),
        ("rope", "forward+backward", 16),
    ]
    for group in found["groups"]:
        assert group["peer"] == "transformers apply_rotary_pos_emb"
        assert {r["name"] for r in group["rows"]} == {*dispatch.backends("rope"), group["peer"]}
        chosen = [r for r in group["rows"] if r["chosen"]]
        assert len(chosen) == 1 and group["reached"] == chosen[0]["ratio"]
        for row in group["rows"]:
            if row["problem"] is None:
                assert {"median_ms", "min_ms", "spread", "rounds", "gb_s", "roofline", "ratio", "error"} <= set(row)


def test_an_op_as_a_table(zoo):
    out = zoo("bench", "short_conv", "--seq", 16, "--rounds", 1, "--peer", "reference", "--only", "step").out
    assert "short_conv" in out and "step after 16" in out and "(bound)" in out and "1 threads" in out
    assert "forward" not in out.splitlines()[1]


def test_layers_and_a_picture(zoo, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "layers.png"
    printed = zoo("bench", "layers", "--only", "lightning", "--seq", 16, "--rounds", 1, "--plot", picture)
    assert "transformers, block 64" in printed.out and picture.read_bytes().startswith(b"\x89PNG")


def test_scaling_and_a_picture(zoo, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "scaling.png"
    args = ("bench", "scaling", "--only", "short_conv", "--seq", "16,32", "--rounds", 1, "--json", "--plot", picture)
    found = json.loads(zoo(*args).out)
    assert [g["what"] for g in found["groups"]] == ["forward", "forward+backward"]
    assert [r["seq"] for r in found["groups"][0]["rows"]] == [16, 32]
    assert "growth" in found["groups"][0]["rows"][1] and "memory" in found["groups"][0]["rows"][1]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "quadratic" in zoo("bench", "scaling", "--only", "diagonal_scan", "--seq", "16,32", "--rounds", 1).out


def test_sparse(zoo):
    out = zoo("bench", "sparse", "--seq", 256, "--rounds", 1, "--only", "128x128").out
    assert "25% of blocks, 128x128 per head" in out and "SDPA, dense causal" in out


def test_results_are_kept(zoo, tmp_path, monkeypatch):
    monkeypatch.setattr(session, "results_folder", lambda: tmp_path)
    zoo("bench", "rope", "--seq", 16, "--rounds", 1, "--save")
    zoo("bench", "rope", "--seq", 16, "--rounds", 1, "--save", "--threads", 2, "--dtype", "float64")
    (folder,) = tmp_path.iterdir()
    assert sorted(p.name for p in folder.iterdir()) == ["rope.json", "rope_float64_2_threads.json"]
    kept = json.loads((folder / "rope.json").read_text())
    assert kept["bench"] == "rope" and kept["command"] and kept["date"].endswith("+00:00")


def test_a_wrong_result_fails(zoo, monkeypatch):
    from zoo.bench.peers import transformers

    monkeypatch.setattr(transformers, "rotary", lambda x: (lambda x: 2 * x, [x]))
    printed = zoo("bench", "rope", "--seq", 16, "--rounds", 1, code=1)
    assert "not timed: its result is off by" in printed.err


def test_a_peer_that_cannot_be_imported_is_a_row(zoo, monkeypatch):
    from zoo.bench.peers import transformers

    monkeypatch.setattr(transformers, "problem", lambda device: "transformers is not installed")
    out = zoo("bench", "rope", "--seq", 16, "--rounds", 1).out
    assert "not timed: transformers apply_rotary_pos_emb: transformers is not installed" in out


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (("atention",), "nothing to bench is called 'atention'; did you mean attention?"),
        (("rope", "--seq", "a"), "--seq a: write lengths"),
        (("rope", "--seq", "0"), "--seq 0: write lengths"),
        (("rope", "--device", "tpu"), "--device tpu: can be cpu or cuda"),
        (("rope", "--dtype", "int8"), "--dtype int8: can be one of float64"),
        (("rope", "--plot", "x.gif"), "must end in .png"),
        (("rope", "--tune"), "give --device cuda"),
        (("layers", "--only", "lightening"), "no such layer; did you mean lightning?"),
        (("rope", "--only", "nothing"), "matches nothing"),
        (("scaling", "--seq", "64"), "at least two"),
    ],
)
def test_requests_that_are_wrong(zoo, args, sentence):
    printed = zoo("bench", *args, code=2)
    assert sentence in printed.err and not printed.out


def test_an_op_without_a_case_says_so(zoo, monkeypatch):
    from zoo.bench import cases

    monkeypatch.setattr(cases, "CASES", ())
    assert "rope has no case to time yet" in zoo("bench", "rope", code=2).err


def test_a_picture_without_matplotlib_is_refused_first(zoo, monkeypatch):
    from zoo.bench import plot

    monkeypatch.setattr(plot.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'block-zoo[report]'" in zoo("bench", "rope", "--plot", "x.png", code=1).err


def test_an_unknown_peer_is_told(zoo):
    printed = zoo("bench", "rope", "--seq", 16, "--rounds", 1, "--peer", "nobody")
    assert "no row called 'nobody'" in printed.err


def test_draws_are_the_same_every_time():
    import torch

    a, b = (Draw("cpu", torch.float32)(3, 4) for _ in range(2))
    assert torch.equal(a, b)
