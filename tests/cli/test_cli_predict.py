"""zoo profile on devices that are not here, and zoo calibrate."""

from __future__ import annotations

import json

import pytest

from zoo.predict import calibrate


def run_of(printed):
    return json.loads(printed.out)["runs"][0]


def test_another_device_is_predicted_only(zoo, tiny):
    printed = zoo("profile", tiny, "--device", "h100")
    assert "predicted for H100 in bfloat16" in printed.out and "not calibrated" in printed.out
    assert "fits:" in printed.out and "measured" not in printed.out and not printed.err
    for mode in ("train", "prefill", "decode"):
        run = run_of(zoo("profile", tiny, "--device", "MI300X", "--mode", mode, "--json"))
        assert run["measured"] is None and run["not_measured"] == "MI300X is not here"
        assert set(run["predicted"]["nodes"]) == {n["path"] for n in run["nodes"]}
        assert run["predicted"]["total"] > 0 and not run["predicted"]["calibrated"] and run["limits"]["fits"]


def test_weights_are_halves_where_nothing_is_trained(zoo, tiny):
    need = {
        dtype: run_of(zoo("profile", tiny, "--device", "h100", "--mode", "decode", "--dtype", dtype, "--json"))
        for dtype in ("bfloat16", "float32")
    }
    assert need["bfloat16"]["bytes_read"] < 0.55 * need["float32"]["bytes_read"]


def test_a_run_has_a_bill(zoo, tiny):
    printed = zoo("profile", tiny, "--device", "h100", "--gpus", 4, "--tokens", "1B", "--price", 2.5, "--seq", 64)
    assert "4 H100, " in printed.out and "GPU hours" in printed.out and "in money" in printed.out
    run = run_of(zoo("profile", tiny, "--device", "h100", "--gpus", 4, "--batch", 2, "--seq", 64, "--json"))["run"]
    assert run["plan"]["layout"]["ranks"] == 4 and run["tokens"] == 4 * 2 * 64 and run["steps"] == 1
    run = run_of(zoo("profile", tiny, "parallel.tp=2", "--device", "h100", "--gpus", 2, "--seq", 64, "--json"))["run"]
    assert run["plan"]["layout"]["tp"] == 2 and run["money"] is None


@pytest.mark.parametrize(
    "args, words",
    [
        (("--device", "H1000"), "did you mean h100"),
        (("--device", "a100", "--dtype", "float8"), "A100 has no products in float8"),
        (("--dtype", "bfloat16"), "on cpu passes are measured in float32"),
        (("--device", "h100", "--gpus", "2", "--mode", "decode"), "about training runs"),
        (("--device", "h100", "--price", "2"), "of how many --tokens"),
        (("--device", "h100", "--tokens", "some"), "write a number, as in 10B"),
        (("--device", "h100", "--gpus", "4", "parallel.pp=3"), "pp"),
        (("--tokens", "1B"), "`zoo calibrate` measures this device first"),
    ],
)
def test_wrong_requests_are_one_sentence(zoo, tiny, args, words):
    assert words in zoo("profile", tiny, *args, code=2).err


def test_a_context_beyond_the_memory_is_said(zoo):
    printed = zoo("profile", "llama_1b", "--mode", "decode", "--context", 10**7, "--device", "l40s")
    assert "does not fit" in printed.out and "0 rows of 10,000,001 tokens" in printed.out


def test_calibrate_then_profile(zoo, tiny, monkeypatch):
    assert "`zoo calibrate` measures this device first" in zoo("profile", tiny, "--no-measure").out
    probe = calibrate.Probe(32, 64, False, (("prefill", 1, 16, 0), ("train", 1, 16, 0), ("decode", 1, 1, 8)))
    monkeypatch.setattr(calibrate, "usable", lambda probe: [{"swiglu": {}}, {"mlp": {}}])
    monkeypatch.setattr(calibrate, "JOINED", ({"repeat": 2, "of": ["mlp"]},))
    monkeypatch.setattr(calibrate, "VARIED", ())
    monkeypatch.setitem(calibrate.LADDERS, "cpu", (32, (1, 2)))
    monkeypatch.setattr(calibrate, "ROUNDS", 1)
    monkeypatch.setitem(calibrate.PROBES, "cpu", (probe,))
    monkeypatch.setitem(calibrate.WIDTHS, "cpu", (32,))
    printed = zoo("calibrate")
    assert "kept in" in printed.out and "linear" in printed.out
    document = json.loads(zoo("calibrate", "--json").out)
    assert document["path"].endswith(".json") and set(document["blocks"]) >= {"swiglu", "mlp", "norm", "head"}
    out = zoo("profile", tiny, "--seq", 16).out
    assert "ratio" in out and "predicted for cpu in float32" in out and "calibrated elsewhere" not in out
    run = run_of(zoo("profile", tiny, "--seq", 16, "--json"))
    ratios = run["predicted_over_measured"]
    assert ratios["total"] == pytest.approx(run["predicted"]["total"] / run["measured"]["total"])
    assert set(ratios["nodes"]) == set(run["measured"]["nodes"]) and run["predicted"]["calibrated"]


def test_calibrate_refuses_other_devices(zoo):
    assert "can be cpu or cuda" in zoo("calibrate", "--device", "h100", code=2).err
