"""kill -9 at random moments, a vanished file: the run goes on as if nothing had been, or says one clear sentence."""

import forked
import kills
import pytest
from tiny_runs import config, history, texts

from zoo.errors import DataError
from zoo.train.run import train

pytestmark = pytest.mark.usefixtures("short_samples")


def test_killed_at_random_moments_and_resumed_is_bit_identical(tmp_path):
    source = texts(tmp_path / "texts")
    options = {"steps": 14, "checkpoint_every": 2, "eval_every": 7}
    uninterrupted = forked.start(kills.run, "dense", str(source), str(tmp_path / "whole"), False, options)
    out = tmp_path / "run"
    rows = []
    for background in (False, True):
        more = options | {"checkpoint_async": background}
        rows += kills.killed("dense", source, out, 2, seed=7 + background, options=more)
    kills.run("dense", str(source), str(out), True, options)
    uninterrupted.join()
    assert kills.equal(out, tmp_path / "whole"), rows
    assert any(row["while saving"] for row in rows), rows
    assert not any(row["passed over"] or row["finished before"] for row in rows), rows
    assert not list((out / "checkpoint").glob(".*"))


def test_a_vanished_data_file_is_one_sentence(tmp_path):
    source = texts(tmp_path / "texts")
    out = tmp_path / "run"
    train(config("dense", source, steps=3), out=out, progress=False)
    before = history(out)
    (source / "7.txt").rename(tmp_path / "7.txt")
    with pytest.raises(DataError, match=r"cannot be resumed: the data are not those of its first start") as caught:
        train(config("dense", source, steps=3), out=out, resume=True, steps=5, progress=False)
    assert "\n" not in str(caught.value) and history(out) == before
    (tmp_path / "7.txt").rename(source / "7.txt")
    again = train(config("dense", source, steps=3), out=out, resume=True, steps=5, progress=False)
    assert again.step == 5
    for file in source.iterdir():
        file.unlink()
    with pytest.raises(DataError) as caught:
        train(config("dense", source, steps=3), out=out, resume=True, steps=7, progress=False)
    assert "\n" not in str(caught.value) and str(source) in str(caught.value)
