"""tools/claims: every claim says what it is, runs, and what is committed agrees with its own figures."""

from __future__ import annotations

import ast
import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "tools" / "claims"
NAMES = sorted(p.stem for p in FOLDER.glob("*.py") if not p.stem.startswith("_") and p.stem != "common")


@pytest.fixture
def common(monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(FOLDER.parent)
    from claims import common

    yield common
    for name in [n for n in sys.modules if n.split(".")[0] == "claims"]:
        del sys.modules[name]


@pytest.mark.parametrize("name", NAMES)
def test_a_claim_says_what_it_claims_and_what_would_refute_it(name):
    doc = ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text(encoding="utf-8")))
    title, empty, *_ = doc.splitlines()
    assert title.endswith(".") and not empty and len(title) < 90
    for part in ("\nClaim: ", "\nMeasured: ", "\nRefuted if ", "arXiv:"):
        assert part in doc, part


@pytest.mark.parametrize("name", NAMES)
def test_it_runs_and_writes_its_three_files(name, common, tmp_path):
    common.measure(name, tmp_path, tiny=True, quiet=True)
    assert {p.name for p in tmp_path.iterdir()} == {f"{name}.json", f"{name}.md", f"{name}.png"}
    assert common.read(name, tmp_path)["rows"]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_committed_agrees_with_its_figures(name, common):
    record = common.read(name)
    assert not record["tiny"]
    assert (common.RESULTS / f"{name}.md").read_text(encoding="utf-8") == common.markdown(record)
    picture = common.RESULTS / f"{name}.png"
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size < 100_000
    assert record["verdicts"] and "seed" in " ".join(record["settings"])


def test_the_learning_rate_rises_to_its_full_height_and_falls_to_a_tenth(common):
    rates = [common.rate(step, 1000, 50) for step in range(1, 1001)]
    assert rates[0] == pytest.approx(1 / 50, rel=1e-3) and rates[49] == max(rates) > 0.99
    assert rates[499] == pytest.approx(0.55) and rates[-1] == pytest.approx(0.1)


def test_training_moves_by_that_rate(common):
    model, moved = torch.nn.Linear(1, 1, bias=False), [0.0]
    torch.nn.init.zeros_(model.weight)
    batches = iter(lambda: (torch.ones(1, 1), torch.zeros(1, 1)), None)
    with common.reporting(quiet=True) as report:
        common.train(
            model, batches, report.bar("", 40), steps=40, lr=0.01, warmup=10,
            loss_of=lambda model, x, y: model(x).sum(),  # its gradient is 1, so Adam moves by the rate
            after_step=lambda step, loss: moved.append(model.weight.item()),
        )  # fmt: skip
    steps = [a - b for a, b in itertools.pairwise(moved)]
    assert steps == pytest.approx([0.01 * common.rate(n, 40, 10) for n in range(1, 41)], rel=1e-3)


def test_kinds_of_bytes(common):
    hnet = common.claim("hnet")
    kinds = hnet.kinds_of(np.frombuffer(b"ab_c = d\n", np.uint8))
    assert [hnet.KINDS[k].split()[0] for k in kinds] == [
        "first", "second", "later", "later", "white", "other", "white", "first", "white",
    ]  # fmt: skip


def test_images_are_of_the_classes_that_were_chosen(common):
    raptor = common.claim("raptor")
    inputs, labels = next(raptor.batches(raptor.drawn()[0]))
    assert inputs.shape == (raptor.BATCH, 1, 16, 16)
    assert {list(raptor.REGIONS)[i] for i in labels.flatten().tolist()} == set(raptor.CLASSES)


def test_the_training_flops_are_equal(common):
    flops = [row["flops"] for row in common.read("equal_flops")["rows"]]
    assert max(flops) < 1.01 * min(flops)
