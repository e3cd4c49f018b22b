import io
import json

import pytest
from rich.console import Console
from tiny_runs import full_disk

from zoo.errors import ZooError
from zoo.train.curve import MetricsFile, draw, read_metrics
from zoo.train.files import new_file, new_folder, write_text
from zoo.train.progress import Reporter, clock


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    write_text(path, "old")
    with full_disk(), pytest.raises(ZooError, match=r"a\.json: cannot be written: ") as caught:
        write_text(path, "x" * 5000)
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == ["a.json"] and path.read_text() == "old"
    with pytest.raises(RuntimeError), new_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert names(tmp_path) == ["a.json"] and path.read_text() == "old"


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    for text in ("one", "two"):
        with new_folder(tmp_path / "model") as temporary:
            (temporary / f"{text}.txt").write_text(text)
    assert names(tmp_path) == ["model"] and names(tmp_path / "model") == ["two.txt"]
    with full_disk(), pytest.raises(ZooError), new_folder(tmp_path / "model") as temporary:
        (temporary / "three").write_text("x" * 5000)
    assert names(tmp_path) == ["model"] and names(tmp_path / "model") == ["two.txt"]
    with pytest.raises(ZooError, match="cannot be written"):
        write_text(tmp_path / "model" / "two.txt" / "below", "")


def test_metrics_drop_what_a_kill_cut_off_and_what_is_trained_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as metrics:
        for step in range(1, 6):
            metrics.add({"step": step, "loss": 1 / step})
    with path.open("a") as file:
        file.write('{"step": 6, "lo')
    assert [r["step"] for r in read_metrics(path)] == [1, 2, 3, 4, 5]
    with MetricsFile(path, last_step=3) as metrics:
        metrics.add({"step": 4, "loss": 0.5})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]
    with MetricsFile(path, last_step=4) as metrics, full_disk(200), pytest.raises(ZooError, match=r"metrics\.jsonl"):
        for _ in range(50):
            metrics.add({"step": 5, "loss": 0.5})


def test_curve_is_a_picture(tmp_path):
    records = [{"step": i, "loss": 5 / i} | ({"heldout_loss": 5 / i} if i % 5 == 0 else {}) for i in range(1, 20)]
    draw(records, tmp_path / "loss.png", {"unigram": 4.6, "bigram": 3.5, "gzip": 1.9}, bits=True)
    draw(records[:1], tmp_path / "one.png", {}, bits=False)
    for name in ("loss.png", "one.png"):
        assert (tmp_path / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert names(tmp_path) == ["loss.png", "one.png"]


def test_reporter_on_a_terminal_and_in_a_file():
    for terminal in (True, False):
        text = io.StringIO()
        with Reporter(console=Console(file=text, force_terminal=terminal, width=100)) as report:
            report.begin("reading data")
            report.end()
            report.begin("training", 3)
            for i in range(3):
                report.advance(i + 1, f"loss {3 - i}.000")
            report.say("done")
        assert "reading data" in text.getvalue() and "loss 1.000" in text.getvalue() and "3/3" in text.getvalue()
    text = io.StringIO()
    with Reporter(False, Console(file=text)) as report:
        report.begin("training", 3)
        report.advance(3, "x")
        report.say("done")
    assert text.getvalue() == ""
    assert (clock(65), clock(3700)) == ("1:05", "1:01:40")
