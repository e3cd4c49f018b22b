"""zoo phases."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tiny_vision import known_phases

import zoo as package

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A saved model of 5 layers in 2 phases."""
    return known_phases((2, 3)).save_pretrained(tmp_path_factory.mktemp("known"))


def test_picture_student_and_figures(zoo, model):
    printed = zoo("phases", model, "--images", 8).out
    assert "5 layers in 2 phases: 1-2 | 3-5" in printed and f"zoo train {model / 'phases' / 'student.yaml'}" in printed
    assert printed.splitlines()[0].startswith("  1 ████") and printed.splitlines()[4].endswith("██████")
    folder = model / "phases"
    assert (folder / "phases.png").read_bytes().startswith(b"\x89PNG")
    student = package.load_config(folder / "student.yaml")
    assert student.distill.teacher == str(model) and [item.stage for item in student.trunk] == [2, 3]
    assert "stage" in zoo("build", folder / "student.yaml").out


def test_json(zoo, model, tmp_path):
    options = ("--images", 8, "--method", "maxcut", "--out", tmp_path, "--json")
    found = json.loads(zoo("phases", model, *options).out)
    assert found["phases"] == [[1, 2], [3, 4, 5]] and found["student"] == str(tmp_path / "student.yaml")
    assert np.array(found["distances"]).shape == (5, 5) and 0 < found["share_inside"] < 0.1
    layers = package.build(tmp_path / "student.yaml", device="meta").layers
    assert found["parameters"]["student"] == sum(p.numel() for p in layers.parameters())


def test_phases_that_come_back_have_no_student(zoo, model, tmp_path, monkeypatch):
    from zoo.train import phases

    monkeypatch.setattr(phases, "find_phases", lambda *args, **options: [[1, 2, 5], [3, 4]])
    printed = zoo("phases", model, "--images", 4, "--method", "maxcut", "--out", tmp_path).out
    assert "1-2,5 | 3-4" in printed and "no student" in printed
    assert {p.name for p in tmp_path.iterdir()} == {"phases.png"}


def test_refuses_in_one_sentence(zoo, model, tmp_path):
    def refused(*args):
        text = zoo("phases", *args, "--out", tmp_path / "out", code=2).err
        assert text.count("\n") == 1 or "Usage" in text, text
        return text

    assert "there is no config.yaml; is it a saved model or a finished run?" in refused(tmp_path)
    package.build("gla_small", ["dim=32", "trunk[0].repeat=1"]).save_pretrained(tmp_path / "text")
    assert "holds no vision model" in refused(tmp_path / "text")
    assert "3 phases of at least 2 layers do not fit" in refused(model, "--phases", 3, "--images", 4)
    assert "no such folder" in refused(model, "--source", tmp_path / "nothing")
    assert "--method" in refused(model, "--method", "guess")
    assert not (tmp_path / "out").exists()


def test_a_student_without_its_teacher_is_refused_in_one_sentence(zoo, tmp_path):
    pytest.importorskip("torchtitan")
    change = f"distill.teacher={tmp_path / 'none'}"
    said = zoo("train", "raptor_small", change, "--out", tmp_path / "run", code=2).err
    assert said.count("\n") == 1 and "distill.teacher: cannot be read" in said and "finished run" in said
    assert not (tmp_path / "run").exists()
