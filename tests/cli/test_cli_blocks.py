"""zoo list, show, verify, doctor."""

from __future__ import annotations

import json

import pytest

from zoo import registry
from zoo.cards import family, option_table, type_in_words
from zoo.schema import Fraction, PositiveInt

SHOWN = ("swiglu", "attention", "rms", "token_choice", "loop", "product_key")


def test_list_names_everything(zoo):
    out = zoo("list").out
    assert all(f"\n{name} " in "\n" + out for name in registry.list_blocks())
    only = zoo("list", "--kind", "norm").out
    assert "rms" in only and "swiglu" not in only
    assert "did you mean mixer" in zoo("list", "--kind", "mixre", code=2).err


def test_list_json(zoo):
    rows = json.loads(zoo("list", "--json").out)
    assert [r["name"] for r in rows] == registry.list_blocks()
    assert {"name", "kind", "summary", "paper", "causal", "streaming", "state_growth", "provider"} == set(rows[0])
    assert {r["kind"] for r in json.loads(zoo("list", "--kind", "ffn", "--json").out)} == {"ffn"}


def test_list_configs(zoo):
    from zoo.graph.loader import config_names

    found = json.loads(zoo("list", "--configs", "--json").out)
    assert [c["name"] for c in found] == config_names() and all(c["description"] for c in found)


@pytest.mark.parametrize("name", SHOWN)
def test_show_tells_all_of_a_card(zoo, name):
    card, out = registry.block_card(name), zoo("show", name).out
    assert card.summary[:60] in out and card.class_name in out and card.paper in out
    for option in option_table(name):
        assert f"\n{option['name']} " in out
    document = json.loads(zoo("show", name, "--json").out)
    assert document["name"] == name and document["doc"] == card.doc
    assert [o["name"] for o in document["options"]] == [o["name"] for o in option_table(name)]


def test_show_prints_brackets_of_shapes(zoo):
    assert "x: [B, T, D]" in zoo("show", "swiglu").out


def test_show_family_in_both_directions(zoo):
    assert "becomes" in (out := zoo("show", "gla").out) and "== linear_attention(" in out
    assert "is what these become" in zoo("show", "linear_attention").out
    tree = family("linear_attention")
    assert {"gla"} <= {m.name for m in tree.general}


def test_every_relation_has_its_two_blocks():
    for name in registry.list_blocks():
        for relation in registry.block_card(name).relations:
            tree = family(name)
            assert any(m.relation == relation for m in tree.special + tree.general) or relation.count(f"{name}(") > 1


def test_show_a_configuration(zoo):
    assert "trunk:" in zoo("show", "llama_1b").out
    document = json.loads(zoo("show", "llama_1b", "--json").out)
    assert document["config"] == "llama_1b" and document["document"]["dim"] == 2048


def test_show_unknown(zoo):
    assert "did you mean swiglu" in zoo("show", "swigluu", code=2).err


def test_types_in_words():
    assert type_in_words(PositiveInt | None) == "an integer >= 1 or null"
    assert type_in_words(Fraction | list[Fraction]) == "a number > 0, <= 1 or a list of a number > 0, <= 1"


def test_verify(zoo):
    assert "checks passed" in zoo("verify", "swiglu", "--only", "causal").out
    document = json.loads(zoo("verify", "swiglu", "--only", "causal", "--json").out)
    assert document["ok"] and document["blocks"][0]["passed"] > 0
    assert "did you mean" in zoo("verify", "swigluu", code=2).err
    assert "did you mean causal" in zoo("verify", "swiglu", "--only", "cuasal", code=2).err


def test_verify_all_asks_every_kind_that_has_checks(zoo):
    blocks = json.loads(zoo("verify", "all", "--only", "card", "--json").out)["blocks"]
    assert {"swiglu", "attention"} <= {b["block"] for b in blocks}


def test_verify_tells_a_failure(zoo, monkeypatch):
    from zoo.conformance import suite
    from zoo.conformance.report import Result

    monkeypatch.setattr(suite, "ask", lambda c, s: Result(s.name, c.name, {}, False, 0.0, "is wrong by 3"))
    assert "is wrong by 3" in zoo("verify", "swiglu", "--only", "causal", code=1).out
    assert json.loads(zoo("verify", "swiglu", "--only", "causal", "--json", code=1).out)["ok"] is False


def test_doctor(zoo):
    from zoo.kernels import dispatch

    found = json.loads(zoo("doctor", "--json").out)
    assert found["python"] and found["torch"]["version"] and found["devices"][0]["name"] == "cpu"
    assert set(found["ops"]) == set(dispatch.ops())
    for devices in found["ops"].values():
        statuses = [r["status"] for r in devices["cpu"]["rows"]]
        assert statuses.count("chosen") == 1 and all(statuses)
    assert {lib["name"] for lib in found["libraries"]} >= {"fla", "mamba_ssm", "xformers", "torchtitan", "transformers"}
    assert all(lib["version"] or "not installed" in lib["problem"] for lib in found["libraries"])
    out = zoo("doctor").out
    assert "linear_attention" in out and "chunked" in out


def test_doctor_survives_a_library_that_cannot_be_imported(monkeypatch):
    import importlib

    from zoo.cli import doctor

    def broken(name):
        raise OSError("undefined symbol: _ZN3c10\nmore")

    monkeypatch.setattr(doctor, "_version", lambda distribution: "1.0")
    monkeypatch.setattr(importlib, "import_module", broken)
    row = doctor._library("fla", "flash-linear-attention", "kernels", "gpu")
    assert row["problem"] == "cannot be imported: OSError: undefined symbol: _ZN3c10"
