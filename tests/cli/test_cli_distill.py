"""zoo distill: what a grafted model still differs in, taught and saved; interrupted and gone on with; refused."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch

import zoo as package

SHORT = ("--seq", 16, "--batch", 2, "--lr", 1e-2)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A teacher that knows bytes, its graft, and two texts."""
    top = tmp_path_factory.mktemp("distill")
    layer = [{"attention": {"num_heads": 2}}, "swiglu"]
    teacher = package.build({"dim": 32, "vocab_size": 257, "trunk": [{"repeat": 2, "of": layer}]})
    teacher.save_pretrained(top / "teacher")
    plan = package.graft.replace(teacher, "attention", "gla")
    plan.model.save_pretrained(top / "student")
    (top / "fox.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 60)
    (top / "more").mkdir()
    (top / "more" / "pack.txt").write_text("pack my box with five dozen liquor jugs\n" * 60)
    (top / "student" / "LICENSE").write_text("as you like")
    return top


def weights(folder):
    return package.from_pretrained(folder).state_dict()


def test_what_differs_is_taught_and_nothing_else(zoo, saved, tmp_path):
    given = (*SHORT, "--steps", 2, "--data", saved / "fox.txt", "--data", saved / "more")
    told = json.loads(
        zoo("distill", saved / "teacher", saved / "student", *given, "--out", tmp_path / "a", "--json").out
    )
    assert told["taught"] == ["layers.0.items.0.block", "layers.1.items.0.block"]
    assert told["steps"] == {"layers": 2, "model": 2} and told["interrupted"] is False
    assert list(told["loss"]) == ["teacher", "before", "after"] and len(set(told["loss"].values())) == 3
    before, after = weights(saved / "student"), weights(tmp_path / "a")
    moved = {n for n in after if not torch.equal(after[n], before[n])}
    assert moved and all(".items.0.block." in n for n in moved)
    assert (tmp_path / "a" / "LICENSE").is_file() and told["copied"] == ["LICENSE"]

    # the same text once is other rows than two texts in equal parts; further teaching goes on from what was saved
    out = zoo("distill", saved / "teacher", tmp_path / "a", *given[:-2], "--out", tmp_path / "b", "--device", "cpu").out
    assert "taught: layers.0.items.0.block" in out and "held-out loss, after" in out and "saved in" in out
    assert any(not torch.equal(t, after[n]) for n, t in weights(tmp_path / "b").items())


@pytest.mark.parametrize("command", ["distill", "graft"])
def test_ctrl_c_keeps_what_was_learned(zoo, saved, tmp_path, monkeypatch, command):
    from zoo.graft.lesson import Lesson

    whole = Lesson.batches

    def interrupted(self, seed=0):
        for number, rows in enumerate(whole(self, seed)):
            if number == 3:
                os.kill(os.getpid(), signal.SIGINT)
            yield rows

    monkeypatch.setattr(Lesson, "batches", interrupted)
    common = (*SHORT, "--data", saved / "fox.txt", "--out", tmp_path / "out", "--json")
    if command == "distill":
        given = ("distill", saved / "teacher", saved / "student", "--steps", 30, *common)
    else:
        given = ("graft", saved / "teacher", "attention", "gla", "--distill", 30, *common)
    told = json.loads(zoo(*given, code=130).out)
    assert told["interrupted"] and told["steps"] == {"layers": 4, "model": 0}
    before, after = weights(saved / "student"), weights(tmp_path / "out")
    assert any(not torch.equal(t, before[n]) for n, t in after.items())


@pytest.mark.parametrize(
    "given, message",
    [
        (("teacher", "teacher"), "the student is the teacher: nothing is to be taught"),
        (("teacher", "more"), "is no saved model, no finished run and no folder of the Hub"),
        (("teacher", "student", "--lr", "2"), "--lr: must be above 0 and below 1"),
        (("teacher", "student", "--device", "nowhere"), "--device nowhere: cannot be used here"),
        (("teacher", "student", "--data", "shapes", "--data", "no.txt"), "must name text"),
        (("teacher", "student", "--data", "no.txt"), "no.txt: no such file"),
    ],
)
def test_wrong_requests_are_one_sentence(zoo, saved, tmp_path, given, message):
    models, options = [saved / g for g in given[:2]], given[2:]
    err = zoo("distill", *models, *options, "--out", tmp_path / "out", code=2).err
    assert message in err and len(err.splitlines()) == 1, err
