"""Drawn shapes, image folders, and a vision model trained on them."""

import sys

import numpy as np
import pytest
import torch

import zoo
from zoo.errors import ConfigError, DataError
from zoo.sections import DataSection, VisionSection
from zoo.train.images import REGIONS, ImageRows, load_image, read_folder, shapes
from zoo.train.loader import TaskRows, batch

VISION = VisionSection(image_size=24, patch_size=8, num_classes=8)


def config(data, **train):
    attention = {"num_heads": 2, "causal": False, "rope": False, "bias": True}
    return {
        "name": "tiny_vision", "architecture": "vision", "dim": 32,
        "vision": {"image_size": 24, "patch_size": 8, "num_classes": 8}, "norm": "layer",
        "residual": {"drop_path": 0.1}, "trunk": [[{"attention": attention}, {"mlp": {"bias": True}}]], "data": data,
        "train": {"steps": 4, "batch_size": 4, "eval_every": 2, "eval_batches": 1, "checkpoint_every": 2,
                  "warmup_steps": 1} | train,
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """Three classes of flat colours, of several sizes."""
    image = pytest.importorskip("PIL.Image")
    for i, (name, colour) in enumerate({"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}.items()):
        (tmp_path / "data" / name).mkdir(parents=True)
        for j in range(8):
            image.new("RGB", (20 + 7 * j, 30 + i), colour).save(tmp_path / "data" / name / f"{j}.png")
    (tmp_path / "data" / "red" / "notes.txt").write_text("no image")
    return tmp_path / "data"


# ------------------------------------------------------------------------------------------------- shapes
def test_a_row_is_a_function_of_seed_split_and_index():
    sample = shapes(VISION)
    rows = TaskRows(sample, 1)
    first, again = rows.row(5), TaskRows(sample, 1).row(5)
    assert np.array_equal(first.inputs, again.inputs) and first.labels == again.labels
    assert first.inputs.shape == (3, 24, 24) and first.inputs.dtype == np.float32 and first.labels.shape == (1,)
    for other in (rows.row(6), TaskRows(sample, 2).row(5), TaskRows(sample, 1, split=1).row(5)):
        assert not np.array_equal(first.inputs, other.inputs)
    part = batch(rows, 0, 3)
    assert part.inputs.dtype == torch.float32 and part.labels.shape == (3, 1) and part.doc_ids is None


def test_every_class_is_drawn_and_can_be_seen():
    drawn = [TaskRows(shapes(VISION), 0).row(i) for i in range(200)]
    counts = np.bincount([int(r.labels[0]) for r in drawn], minlength=len(REGIONS))
    assert len(counts) == len(REGIONS) == 8 and counts.min() > 5
    for row in drawn[:40]:
        pixels = row.inputs.reshape(3, -1)
        # two colours with noise of 0.1 between them: the image varies more than its noise does
        assert (pixels.std(1) > 0.12).all() and abs(pixels).max() < 1.7


def test_regions_differ():
    x, y = np.meshgrid(np.linspace(-1, 1, 41), np.linspace(-1, 1, 41))
    masks = [region(x, y) for region in REGIONS.values()]
    for i, a in enumerate(masks):
        assert 0.1 < a.mean() < 0.9
        for b in masks[:i]:
            assert (a ^ b).mean() > 0.05


# ------------------------------------------------------------------------------------------------- folder
def test_folder(folder):
    found = read_folder(DataSection(source=str(folder), heldout=0.25), VISION)
    assert found.classes == ["blue", "green", "red"] and (len(found.train), len(found.heldout)) == (18, 6)
    assert {p.name for p in found.train}.isdisjoint(p.name for p in found.heldout)
    assert found.summary() == read_folder(DataSection(source=str(folder), heldout=0.25), VISION).summary()
    rows = ImageRows(found.train, VISION, seed=0)
    for row in (rows.row(i) for i in range(18)):
        colour = [-1.0, -1.0, -1.0]
        colour[2 - int(row.labels[0])] = 1.0
        assert row.inputs.shape == (3, 24, 24) and row.inputs.dtype == np.float32
        assert np.array_equal(row.inputs[:, 3, 4], np.array(colour, np.float32))


def test_an_epoch_visits_every_picture_once_in_an_order_of_its_own(folder):
    found = read_folder(DataSection(source=str(folder)), VISION)
    rows, count = ImageRows(found.train, VISION, seed=3), len(found.train)
    orders = [rows._order(e).tolist() for e in (0, 1)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(count)) and orders[0] != orders[1]
    assert np.array_equal(rows.row(count).inputs, load_image(found.train[orders[1][0]].path, VISION))


def test_the_middle_is_cut_out_of_the_resized_image(tmp_path):
    image = pytest.importorskip("PIL.Image")
    pixels = np.zeros((24, 72, 3), np.uint8)
    pixels[:, 24:48] = 255  # the middle third is white
    image.fromarray(pixels).save(tmp_path / "x.png")
    assert (load_image(tmp_path / "x.png", VISION) == 1).all()
    gray = load_image(tmp_path / "x.png", VisionSection(image_size=12, patch_size=4, channels=1))
    assert gray.shape == (1, 12, 12)


def test_errors(folder, monkeypatch):
    def read(source, **vision):
        options = {"image_size": 24, "patch_size": 8, "num_classes": 8} | vision
        return read_folder(DataSection(source=str(source)), VisionSection(**options))

    with pytest.raises(DataError, match="no such folder; a vision model learns from shapes or a folder"):
        read("python-stdlib")
    with pytest.raises(DataError, match="one subfolder per class"):
        read(folder / "red")
    with pytest.raises(ConfigError, match=r"have 3 classes, num_classes is 2"):
        read(folder, num_classes=2)
    with pytest.raises(ConfigError, match="with 1 or 3, got 4"):
        read(folder, channels=4)
    with pytest.raises(ConfigError, match="the shapes have 8 classes, num_classes is 5"):
        shapes(VisionSection(num_classes=5))
    (folder / "red" / "broken.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"broken\.png: cannot be read as an image"):
        load_image(folder / "red" / "broken.png", VISION)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(DataError, match="pip install pillow"):
        read(folder)


# ----------------------------------------------------------------------------------------------- training
def test_training_resumes_exactly(tmp_path):
    pytest.importorskip("torchtitan")
    from zoo.train.run import train

    whole = train(config({"source": "shapes"}), out=tmp_path / "whole", progress=False)
    assert set(whole.evaluation) == {"loss", "accuracy", "scored_images"} and whole.unit == "images"
    assert whole.sample.count("wanted: ") == 16
    train(config({"source": "shapes"}), out=tmp_path / "cut", steps=2, progress=False)
    resumed = train(config({"source": "shapes"}), out=tmp_path / "cut", resume=True, steps=4, progress=False)
    assert resumed.loss == pytest.approx(whole.loss, abs=1e-6)
    again = zoo.from_pretrained(tmp_path / "cut")
    for name, p in whole.model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], p, rtol=0, atol=1e-6)


def test_training_on_a_folder(folder):
    pytest.importorskip("torchtitan")
    from zoo.train.run import train

    result = train(config({"source": str(folder), "heldout": 0.25}, steps=12, lr=3e-3, batch_size=8), progress=False)
    assert result.evaluation["scored_images"] == 6 and result.evaluation["accuracy"] == 1.0
    assert "wanted: " in result.sample


def test_text_and_images_are_not_confused():
    pytest.importorskip("torchtitan")
    from zoo.train.run import train

    with pytest.raises(DataError, match="no such folder"):
        train(config({}), progress=False)
    text = {"dim": 32, "vocab_size": 257, "trunk": ["swiglu"], "data": {"source": "shapes"}}
    with pytest.raises(ConfigError, match="architecture: vision"):
        train(text, progress=False)
