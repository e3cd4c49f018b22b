"""What zoo profile writes and compares, and zoo sweep."""

from __future__ import annotations

import csv
import json

import pytest

from zoo.cli import output


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_sheet_and_page(zoo, tiny, tmp_path):
    sheet, page = tmp_path / "a.csv", tmp_path / "a.html"
    document = json.loads(zoo("profile", tiny, "--device", "H100", "--csv", sheet, "--html", page, "--json").out)
    (run,) = document["runs"]
    found = rows(sheet)
    assert [r["path"] for r in found] == [n["path"] for n in run["nodes"]]
    assert [int(r["flops"]) for r in found] == [n["flops"] for n in run["nodes"]]
    assert float(found[1]["predicted_ms"]) == run["predicted"]["nodes"][found[1]["path"]]
    assert found[0]["measured_ms"] == "" and found[0]["model"] == "tiny" and found[0]["seq_len"] == "32"
    assert page.read_text().startswith("<!doctype html>")
    zoo("profile", tiny, "--device", "H100", "--seq", "8,16", "--csv", sheet)
    assert [r["seq_len"] for r in rows(sheet)] == ["8"] * len(found) + ["16"] * len(found)
    document = json.loads(zoo("profile", tiny, "--seq", 16, "--csv", sheet, "--json").out)
    measured = document["runs"][0]["measured"]
    for row in rows(sheet):
        there = row["path"] in measured["nodes"]
        assert bool(row["measured_ms"]) == bool(row["peak_bytes"]) == there, row
        if there:
            of_node = [measured["phases"][phase][row["path"]] for phase in ("forward", "backward")]
            assert [float(row["forward_ms"]), float(row["backward_ms"])] == of_node
            assert int(row["peak_bytes"]) == measured["memory"]["nodes"][row["path"]]
        assert float(row["pass_measured_ms"]) == measured["total"] and row["pass_compiled_ms"] == ""
    assert "one length" in zoo("profile", tiny, "--seq", "8,16", "--html", page, code=2).err
    assert "cannot be written" in zoo("profile", tiny, "--no-measure", "--csv", "/proc/nowhere/a", code=2).err


def test_depth_folds_the_table(zoo, tiny):
    def shown(*more):
        lines = zoo("profile", tiny, "--device", "H100", *more).out.splitlines()
        return [x for x in lines if "swiglu" in x or "mlp" in x or "exit" in x], lines[-6:]

    full, total = shown()
    one, same = shown("--depth", 1)
    assert total == same and len(one) == 2 <= len(full)
    assert one[0].split()[:3] == ["0-2", "swiglu", "3"]


def test_a_narrow_terminal_gets_fewer_columns_and_is_told(zoo, tiny, monkeypatch):
    def shown(width):
        monkeypatch.setattr(output, "_PIPE_WIDTH", width)
        title, heads, *lines = zoo("profile", tiny, "--device", "H100").out.splitlines()
        left_out = [x for x in lines if x.startswith("(too narrow for ")]
        body = lines[: next(i for i, x in enumerate(lines) if " total " in x) + 1]
        assert title.endswith("times in ms") and all(len(x) <= width for x in [heads, *body])
        assert len(body) == 8, "no row is broken"
        return heads.split(), left_out

    every, none = shown(160)
    some, (words,) = shown(80)
    assert not none and set(some) < set(every) and {"params", "FLOPs", "predicted"} <= set(some)
    assert words == f"(too narrow for {', '.join(h for h in every if h not in some)}; --csv and --json have more)"


def test_compare(zoo, tiny, tmp_path):
    page, sheet = tmp_path / "b.html", tmp_path / "b.csv"
    common = (tiny, "trunk[1].loop.steps=3", "--device", "H100", "--compare", tiny)
    out = zoo("profile", *common, "--html", page, "--csv", sheet).out
    head, *rest = out.splitlines()
    assert "tiny and tiny" in head and any(x.startswith("layer 3: body") for x in rest)
    assert rest[-1].startswith("equal: parameters") and "of layers 0-2" in rest[-1]
    assert '"differences": {' in page.read_text() and len({r["model"] for r in rows(sheet)}) == 1
    document = json.loads(zoo("profile", *common, "--json").out)
    totals = {t["key"]: t for t in document["totals"]}
    first, second = (run["flops"] for run in document["runs"])
    assert totals["flops"]["values"] == [first, second] and totals["flops"]["ratio"] == second / first < 1
    assert "did you mean llama_1b" in zoo("profile", tiny, "--compare", "llama_2b", code=2).err
    assert "are compared by one pass" in zoo("profile", tiny, "--compare", tiny, "--compile", code=2).err


def test_compare_measures_both_where_that_is_wanted(zoo, tiny):
    document = json.loads(zoo("profile", tiny, "dim=64", "--seq", 16, "--compare", tiny, "--measure", "--json").out)
    totals = {t["key"]: t["values"] for t in document["totals"]}
    for i, run in enumerate(document["runs"]):
        found = run["measured"]
        assert (totals["measured"][i], totals["backward"][i]) == (found["total"], found["backward"])
        assert totals["peak_bytes"][i] == found["memory"]["peak"]
    row = next(r for r in document["rows"] if "swiglu" in r["blocks"])
    of_nodes = [run["measured"]["nodes"] for run in document["runs"]]
    assert row["values"][0]["measured"] == pytest.approx(sum(of_nodes[0][f"layers.{i}.0"] for i in range(3)))
    same = json.loads(zoo("profile", tiny, "--seq", 16, "--compare", tiny, "--measure", "--json").out)
    assert same["rows"] == [], "no node differs by its measured time alone"
    assert "measured" in {t["key"] for t in same["totals"]}


def test_compare_of_equal_models_is_one_line(zoo, tiny):
    out = zoo("profile", tiny, "--device", "H100", "--compare", tiny).out
    assert out.startswith("equal: ") and len(out.splitlines()) == 1


def test_sweep(zoo, tiny, tmp_path):
    page, sheet = tmp_path / "c.html", tmp_path / "c.csv"
    ask = ("sweep", tiny, "dim=32,64,0", "trunk[0].of=[swiglu],[swiglu,swiglu]", "--seq", 16)
    document = json.loads(zoo(*ask, "--json", "--html", page, "--csv", sheet).out)
    points = document["points"]
    assert [p["time"] for p in points] == sorted(p["time"] for p in points) and len(points) == 4
    assert any(p["front"] for p in points) and all(p["fits"] and p["tokens"] == 16 for p in points)
    refused = document["refused"]
    assert [r["settings"]["dim"] for r in refused] == ["0", "0"] and "dim" in refused[0]["reason"]
    assert [r["dim"] for r in rows(sheet)] == [p["settings"]["dim"] for p in points]
    one = json.loads(zoo("profile", tiny, "dim=64", "--device", "H100", "--seq", 16, "--json").out)["runs"][0]
    (same,) = [p for p in points if p["settings"] == {"dim": "64", "trunk[0].of": "[swiglu]"}]
    assert same["time"] == one["predicted"]["total"] and same["params"] == one["params"]
    assert same["memory"] == one["limits"]["need"] and page.read_text().startswith("<!doctype html>")
    out = zoo(*ask, "--params", "fewer").out
    assert "4 models, train of 1 x 16 tokens, H100 in bfloat16" in out and "refused: dim" in out
    marked = [x for x in out.splitlines() if x.rstrip().endswith(" *")]
    assert len(marked) == 1 and marked[0].startswith("32 ")  # the smallest has the least of everything


@pytest.mark.parametrize(
    "words, message",
    [(("dim=0,-1",), "none of the 2 combinations makes a model"), (("dim=32",), "nothing to sweep"),
     (("dim=1,2", "--device", "H1000"), "did you mean")],
)  # fmt: skip
def test_sweeps_that_cannot_be(zoo, tiny, words, message):
    assert message in zoo("sweep", tiny, *words, code=2).err


def test_a_sweep_of_nothing_is_told(zoo):
    assert "did you mean llama_1b" in zoo("sweep", "llama_2b", "dim=1,2", code=2).err
