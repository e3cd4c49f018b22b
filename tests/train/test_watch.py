"""The page of a run: read by parsing it, and from the server."""

import json
import math
import re
import subprocess
import sys
import threading
from html.parser import HTMLParser
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
import yaml
from typer.testing import CliRunner

from zoo.cli.app import app
from zoo.errors import ConfigError, ZooError
from zoo.train import watch
from zoo.train.watch import POINTS, server, snapshot, write_page


def lines(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))


@pytest.fixture
def run(tmp_path):
    """The files of a run in its 2500th step of 3000."""
    folder = tmp_path / "run"
    (folder / "incident-step-7").mkdir(parents=True)
    config = {"name": "</script><b>small", "train": {"steps": 3000}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "environment.json").write_text(
        json.dumps({"torch": "2.13", "speed": {"peak_flops": 5e10, "peak_from": "measured"}})
    )
    records = [
        {"step": i, "loss": 1 + 5 / i, "lr": 1e-3, "grad_norm": 1.0, "tokens": 96 * i, "tokens_per_second": 1000.0,
         "seconds": 0.5, "mfu": 0.25, "memory": 2 * 10**9, "blocks": {"load_entropy": 0.9}}
        | ({"heldout_loss": 1.5, "heldout_bits_per_byte": 2.164} if i % 500 == 0 else {})
        for i in range(1, 2501) if i != 7
    ]  # fmt: skip
    lines(folder / "metrics.jsonl", records)
    nodes = {
        "tok_embeddings": {"block": "embedding", "grad_norm": 0.5},
        "layers.0.1": {"block": "moe", "grad_norm": 0.25, "load_entropy": 0.8, "idle_experts": 0.5},
    }
    lines(folder / "health.jsonl", [{"step": 2500, "nodes": nodes, "layers": {"layers.0": math.inf, "layers.1": 2.0}}])
    incident = {"step": 7, "kind": "loss", "value": "nan", "median": None, "skipped": True, "folder": "x", "nodes": [],
                "node": {"path": "layers.0.1", "block": "moe", "what": "output"}}  # fmt: skip
    (folder / "incident-step-7" / "incident.json").write_text(json.dumps(incident))
    return folder


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.ids, self.scripts, self.loads, self.inside = [], [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.loads += [v for k, v in attrs if k in ("src", "href")]
        if tag == "script":
            self.scripts.append("")
            self.inside = "script"

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside:
            self.scripts[-1] += data


def test_what_a_run_says(run):
    said = snapshot(run)
    assert (said["step"], said["steps"], said["state"]) == (2500, 3000, "running")
    facts = dict(said["facts"])
    assert facts["step"] == "2,500 of 3,000" and facts["loss"] == "1.0020" and facts["held-out loss"] == "1.5000"
    assert facts["time left"] == "4 min 10 s" and facts["MFU"] == "25.0 %" and facts["peak memory"] == "2.00 GB"
    curves = {c["title"]: c["series"] for c in said["curves"]}
    assert list(curves) == [
        "loss", "tokens per second", "MFU, %", "learning rate", "norm of the gradient", "peak memory, GB",
        "load_entropy",
    ]  # fmt: skip
    assert [p[0] for p in curves["loss"]["held-out"]] == [500, 1000, 1500, 2000, 2500]
    train = curves["loss"]["train"]
    assert len(train) <= POINTS and train[-1][0] == 2500  # thinned by means: the sum is that of all
    assert train[0][1] == pytest.approx(sum(1 + 5 / i for i in (1, 2, 3)) / 3)
    health = said["health"]
    assert health["columns"] == ["node", "block", "grad_norm", "load_entropy", "idle_experts"]
    assert health["rows"][0] == ["tok_embeddings", "embedding", "0.5", "", ""]
    assert health["bad"] == ["layers.0", "layers.0.1"] and len(health["complaints"]) == 2
    assert health["layers"] == [["layers.0", None], ["layers.1", 2.0]]
    assert said["machine"] == "torch 2.13, peak 50 GFLOP/s (measured)"


def test_the_page_is_whole_and_needs_no_network(run):
    path = write_page(run)
    assert path == run / "watch.html"
    text = path.read_text()
    page = Page(text)
    assert not page.loads and len(page.ids) == len(set(page.ids))
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)
    data, script = page.scripts  # a name with a tag in it ends no script
    assert json.loads(data) == json.loads(json.dumps(snapshot(run)))
    assert "innerHTML" not in script
    assert set(re.findall(r'\$\("(\w+)"\)', script)) <= set(page.ids)
    for key in re.findall(r"\bdata\.(\w+)", script):
        assert key in json.loads(data), key


def test_states(run, monkeypatch):
    records = (run / "metrics.jsonl").read_text().splitlines()
    monkeypatch.setattr(watch, "QUIET_SECONDS", -1.0)
    assert snapshot(run)["state"].startswith("no step for 0 min")
    incident = json.loads((run / "incident-step-7" / "incident.json").read_text()) | {"skipped": False}
    (run / "incident-step-7" / "incident.json").write_text(json.dumps(incident))
    (run / "metrics.jsonl").write_text("\n".join(records[:6]) + "\n")
    assert snapshot(run)["state"] == "stopped"
    (run / "incident-step-7" / "incident.json").unlink()
    lines(run / "metrics.jsonl", [json.loads(records[0]) | {"step": 3000}])
    assert snapshot(run)["state"] == "evaluating"
    (run / "evaluation.json").write_text('{"loss": 1.25, "heldout_bytes": 5000}')
    said = snapshot(run)
    assert said["state"] == "finished" and said["evaluation"] == {"loss": "1.25", "heldout_bytes": "5,000"}
    for name in ("metrics.jsonl", "health.jsonl"):
        (run / name).unlink()
    said = snapshot(run)  # before the first step
    assert (said["facts"], said["curves"], said["health"], said["step"]) == ([], [], None, 0)
    assert Page(watch.page(run)).scripts
    with pytest.raises(ConfigError, match="is no run folder"):
        snapshot(run / "checkpoint")


def test_the_server_gives_the_page_and_what_is_new(run):
    with server(run, 0) as serving:
        thread = threading.Thread(target=serving.serve_forever, daemon=True)
        thread.start()
        port = serving.server_address[1]
        with urlopen(f"http://127.0.0.1:{port}/") as answer:
            assert answer.headers["Content-Type"].startswith("text/html") and b"zoo watch" in answer.read()
        with (run / "metrics.jsonl").open("a") as file:
            file.write('{"step": 2501, "loss": 0.5, "tokens_per_second": 1.0, "seconds": 1.0}\n{"step": 2502, "lo')
        with urlopen(f"http://127.0.0.1:{port}/data") as answer:
            assert json.loads(answer.read())["step"] == 2501
        with pytest.raises(HTTPError, match="404"):
            urlopen(f"http://127.0.0.1:{port}/config.yaml")
        (run / "evaluation.json").write_text("{")
        with pytest.raises(HTTPError, match="503"):
            urlopen(f"http://127.0.0.1:{port}/data")
        with pytest.raises(ZooError, match="--port 0 takes a free one"):
            server(run, port)
        serving.shutdown()
        thread.join()


def test_the_command(run):
    done = CliRunner().invoke(app, ["watch", str(run), "--once"])
    assert done.exit_code == 0 and done.stdout.strip() == str(run / "watch.html") and (run / "watch.html").is_file()
    assert json.loads(CliRunner().invoke(app, ["watch", str(run), "--json"]).stdout)["step"] == 2500
    assert CliRunner().invoke(app, ["watch", str(run / "none"), "--once"]).exit_code == 2
    code = "import sys, zoo.train.watch; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
